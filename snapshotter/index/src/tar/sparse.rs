//! Sparse files: the old GNU form and GNU's PAX forms 0.0, 0.1 and 1.0.
//!
//! Source: the GNU tar manual, "Storing Sparse Files". All say which runs of the file are stored;
//! the runs follow one another in the payload.

use super::Extent;
use super::header::{Header, Type, number};
use super::pax::{Records, unsigned};

/// Most runs of one file: what fits the largest extension header, roughly.
const MAX_RUNS: usize = 1 << 16;

/// The map of a sparse file, as far as it is known.
#[derive(Debug)]
pub(super) struct SparseMap {
    size: u64,
    /// Offset in the file and length.
    runs: Vec<(u64, u64)>,
    rest: Rest,
}

/// Where the rest of a map is.
#[derive(Debug)]
enum Rest {
    Nowhere,
    /// In GNU extension headers.
    Extensions,
    /// In front of the data: decimal numbers, one a line, the first one their count.
    Payload {
        line: Vec<u8>,
        offset: Option<u64>,
        left: Option<u64>,
    },
}

impl SparseMap {
    /// What the headers say of a map; `None` for an ordinary file. Of PAX forms, the name given for
    /// the sparse file replaces the entry's.
    pub(super) fn of(header: &mut Header, records: &Records) -> Result<Option<Self>, &'static str> {
        if header.typ == Type::GnuSparse {
            return Self::gnu(header).map(Some);
        }
        let is_one = match (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")) {
            (Some(b"0"), Some(b"0" | b"1")) => false,
            (Some(b"1"), Some(b"0")) => true,
            (None, None) if records.get("GNU.sparse.map").is_some() => false,
            _ => return Ok(None),
        };
        if header.typ != Type::File {
            return Err("only files can be sparse");
        }
        if let Some(name) = records.get("GNU.sparse.name") {
            header.name = name.to_vec();
        }
        let size = records.get("GNU.sparse.size").or(records.get("GNU.sparse.realsize"));
        let size = match size {
            Some(size) => unsigned(size).ok_or("the size is not a number")?,
            None => header.size,
        };
        if is_one {
            let rest = Rest::Payload { line: Vec::new(), offset: None, left: None };
            return Ok(Some(Self { size, runs: Vec::new(), rest }));
        }
        let count = records.get("GNU.sparse.numblocks").and_then(unsigned);
        let count = count.ok_or("the number of runs is missing")?;
        let mut map = Self { size, runs: Vec::new(), rest: Rest::Nowhere };
        let mut numbers = records.get("GNU.sparse.map").unwrap_or(b"").split(|b| *b == b',');
        while let (Some(offset), len) = (numbers.next().filter(|n| !n.is_empty()), numbers.next()) {
            let offset = unsigned(offset).ok_or("an offset is not a number")?;
            let len = len.and_then(unsigned).ok_or("a length is not a number")?;
            map.add(offset, len)?;
        }
        if map.runs.len() as u64 != count {
            return Err("the number of runs is not the one announced");
        }
        Ok(Some(map))
    }

    /// The start of an old GNU map: four runs in the header itself.
    fn gnu(header: &Header) -> Result<Self, &'static str> {
        let block = header.gnu.as_deref().ok_or("the GNU header is missing")?;
        let size = number(&block[483..495]).and_then(|size| u64::try_from(size).ok());
        let size = size.ok_or("the size is malformed")?;
        let rest = if block[482] == 0 { Rest::Nowhere } else { Rest::Extensions };
        let mut map = Self { size, runs: Vec::new(), rest };
        map.add_gnu(&block[386..482])?;
        Ok(map)
    }

    pub(super) fn is_complete(&self) -> bool {
        matches!(self.rest, Rest::Nowhere)
    }

    /// Whether the blocks to push are part of the entry's payload.
    pub(super) fn in_payload(&self) -> bool {
        matches!(self.rest, Rest::Payload { .. })
    }

    /// Takes the next block of an incomplete map.
    pub(super) fn push(&mut self, block: &[u8]) -> Result<(), &'static str> {
        match std::mem::replace(&mut self.rest, Rest::Nowhere) {
            Rest::Nowhere => Err("it goes on behind its end"),
            Rest::Extensions => {
                self.add_gnu(&block[..504])?;
                if block[504] != 0 {
                    self.rest = Rest::Extensions;
                }
                Ok(())
            }
            Rest::Payload { mut line, mut offset, mut left } => {
                for byte in block {
                    if left == Some(0) {
                        break;
                    }
                    if *byte != b'\n' {
                        line.push(*byte);
                        if line.len() > 20 {
                            return Err("a number is too long");
                        }
                        continue;
                    }
                    let number = unsigned(&line).ok_or("a number is malformed")?;
                    line.clear();
                    match (left, offset.take()) {
                        (None, _) => left = Some(number),
                        (Some(_), None) => offset = Some(number),
                        (Some(more), Some(start)) => {
                            self.add(start, number)?;
                            left = Some(more - 1);
                        }
                    }
                }
                if left != Some(0) {
                    self.rest = Rest::Payload { line, offset, left };
                }
                Ok(())
            }
        }
    }

    /// The file's length, holes included.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Where the runs lie, `stored` bytes of them starting at `at` in the stream.
    pub(super) fn extents(&self, at: u64, stored: u64) -> Result<Vec<Extent>, &'static str> {
        let mut end = 0;
        let mut used = 0_u64;
        let mut out = Vec::with_capacity(self.runs.len());
        for &(logical, len) in &self.runs {
            let run_end = logical.checked_add(len).filter(|run_end| *run_end <= self.size);
            if logical < end {
                return Err("its runs overlap or are out of order");
            }
            end = run_end.ok_or("a run lies behind the end of the file")?;
            if len > 0 {
                out.push(Extent { logical, len, at: at.saturating_add(used) });
            }
            used = used.saturating_add(len);
        }
        if used != stored {
            return Err("its runs do not add up to what is stored");
        }
        Ok(out)
    }

    fn add(&mut self, offset: u64, len: u64) -> Result<(), &'static str> {
        if self.runs.len() >= MAX_RUNS {
            return Err("it has more than 65536 runs");
        }
        self.runs.push((offset, len));
        Ok(())
    }

    /// Runs of 24 bytes: two numbers of 12. An offset that starts with NUL ends them.
    fn add_gnu(&mut self, runs: &[u8]) -> Result<(), &'static str> {
        for run in runs.chunks_exact(24).take_while(|run| run[0] != 0) {
            let part = |field: &[u8]| number(field).and_then(|n| u64::try_from(n).ok());
            let offset = part(&run[..12]).ok_or("an offset is malformed")?;
            self.add(offset, part(&run[12..]).ok_or("a length is malformed")?)?;
        }
        Ok(())
    }
}
