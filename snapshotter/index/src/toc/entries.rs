//! The TOC's JSON, one entry at a time: what a hostile TOC can make us hold is one entry, however many
//! it has.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::Error;

/// An entry of either format; what isn't said is zero or empty.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct TocEntry {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub size: u64,
    pub modtime: Option<String>,
    pub link_name: String,
    pub mode: i64,
    pub uid: u32,
    pub gid: u32,
    pub dev_major: u32,
    pub dev_minor: u32,
    /// Values in base64.
    pub xattrs: Option<BTreeMap<String, String>>,
    /// Of the chunk's member or frame in the blob; a file's entry is its first chunk's too.
    pub offset: u64,
    /// eStargz: where the chunk's data starts in what its member decodes to.
    pub inner_offset: u64,
    pub chunk_offset: u64,
    pub chunk_size: u64,
    /// zstd:chunked: `zeros` for a hole.
    pub chunk_type: String,
    /// Of the file, `sha256:…`.
    pub digest: String,
    /// Of the chunk; may be left out where that is the whole file.
    pub chunk_digest: String,
}

/// Gives `sink` each entry in order; stops at its first error.
pub(super) fn each(
    json: &[u8],
    sink: &mut dyn FnMut(TocEntry) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut failed = None;
    let mut reader = serde_json::Deserializer::from_slice(json);
    let version = Top { sink, failed: &mut failed }
        .deserialize(&mut reader)
        .and_then(|version| reader.end().map(|()| version));
    match (failed, version) {
        (Some(error), _) => Err(error),
        (None, Ok(1)) => Ok(()),
        (None, Ok(version)) => Err(Error::Version(version)),
        (None, Err(source)) => Err(Error::Json { source }),
    }
}

/// The object around the entries; its value is the version.
struct Top<'a> {
    sink: &'a mut dyn FnMut(TocEntry) -> Result<(), Error>,
    failed: &'a mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = u64;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u64, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<u64, M::Error> {
        let mut version = 0;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "version" => version = map.next_value()?,
                "entries" => map.next_value_seed(Entries {
                    sink: &mut *self.sink,
                    failed: &mut *self.failed,
                })?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(version)
    }
}

struct Entries<'a> {
    sink: &'a mut dyn FnMut(TocEntry) -> Result<(), Error>,
    failed: &'a mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the TOC's entries")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<(), S::Error> {
        while let Some(entry) = seq.next_element()? {
            if let Err(error) = (self.sink)(entry) {
                *self.failed = Some(error);
                return Err(serde::de::Error::custom("an entry was refused"));
            }
        }
        Ok(())
    }
}
