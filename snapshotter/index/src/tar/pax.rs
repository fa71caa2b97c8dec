//! The records of a PAX extended header: `LENGTH KEY=VALUE\n`.
//!
//! Source: POSIX.1-2001, "pax Extended Header".

/// Records by key, the last of each key; those of GNU sparse maps 0.0, whose keys repeat, are
/// folded into the form of 0.1.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: std::collections::BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Records {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, &'static str> {
        let mut out = Self::default();
        let mut map: Vec<u8> = Vec::new();
        let mut fields = 0_usize;
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes)?;
            bytes = rest;
            match key {
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    let is_offset = key == b"GNU.sparse.offset";
                    if is_offset != fields.is_multiple_of(2) || value.contains(&b',') {
                        return Err("GNU.sparse.offset and GNU.sparse.numbytes do not alternate");
                    }
                    if fields > 0 {
                        map.push(b',');
                    }
                    map.extend_from_slice(value);
                    fields += 1;
                }
                _ => drop(out.records.insert(key.to_vec(), value.to_vec())),
            }
        }
        if fields > 0 {
            out.records.insert(b"GNU.sparse.map".to_vec(), map);
        }
        Ok(out)
    }

    /// In the order of the keys.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.records.iter().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    /// The value of a key, unless it is empty.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.records.get(key.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }
}

/// The first record: key, value and what follows it.
fn record(bytes: &[u8]) -> Result<(&[u8], &[u8], &[u8]), &'static str> {
    let space = bytes.iter().take(20).position(|b| *b == b' ').ok_or("a record has no length")?;
    let len = unsigned(&bytes[..space]).ok_or("a record's length is not a number")?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > bytes.len() || len < space + 2 {
        return Err("a record's length does not fit the header");
    }
    let (record, rest) = bytes.split_at(len);
    let Some((b'\n', record)) = record[space + 1..].split_last() else {
        return Err("a record does not end with a line feed");
    };
    let equals = record.iter().position(|b| *b == b'=').ok_or("a record has no value")?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    if key.is_empty() || key.contains(&0) {
        return Err("a record's key is empty or has a NUL");
    }
    if matches!(key, b"path" | b"linkpath" | b"uname" | b"gname") && value.contains(&0) {
        return Err("a name has a NUL");
    }
    Ok((key, value, rest))
}

/// A decimal number of at most 2⁶³ − 1.
pub(super) fn unsigned(text: &[u8]) -> Option<u64> {
    signed(text).and_then(|n| u64::try_from(n).ok())
}

pub(super) fn signed(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Decimal seconds with any number of decimals, of which nine count; negative ones lie before 1970.
pub(super) fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !decimals.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = decimals.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0_u32, |n, digit| n * 10 + u32::from(digit - b'0'));
    if whole.starts_with('-') && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::{Records, time};

    #[test]
    fn times_keep_nanoseconds() {
        for (text, want) in [
            ("0", Some((0, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.000000001", Some((1, 1))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("1.", Some((1, 0))),
            ("-1", Some((-1, 0))),
            ("-1.5", Some((-2, 500_000_000))),
            ("-0.25", Some((-1, 750_000_000))),
            ("", None),
            (".5", None),
            ("1.x", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), want, "{text:?}");
        }
    }

    #[test]
    fn records_are_checked() {
        for (header, want) in [
            ("", Ok(())),
            ("6 a=b\n", Ok(())),
            ("5 a=\n", Ok(())),
            ("30 mtime=1350244992.023960108\n", Ok(())),
            ("a=b\n", Err("a record has no length")),
            ("x a=b\n", Err("a record's length is not a number")),
            ("-6 a=b\n", Err("a record's length is not a number")),
            ("7 a=b\n", Err("a record's length does not fit the header")),
            ("2 a=b\n", Err("a record's length does not fit the header")),
            ("5 a=b\n", Err("a record does not end with a line feed")),
            ("6 abc\n", Err("a record has no value")),
            ("5 =b\n", Err("a record's key is empty or has a NUL")),
            ("12 path=a\0b\n", Err("a name has a NUL")),
            ("99999999999999999999999 a=b\n", Err("a record has no length")),
        ] {
            assert_eq!(Records::parse(header.as_bytes()).map(drop), want, "{header:?}");
        }
    }

    #[test]
    fn the_last_record_of_a_key_counts() {
        let records = Records::parse(b"6 a=b\n6 a=c\n5 b=\n").unwrap();
        assert_eq!(records.get("a"), Some(&b"c"[..]));
        assert_eq!(records.get("b"), None);
        assert_eq!(records.iter().count(), 2);
    }
}
