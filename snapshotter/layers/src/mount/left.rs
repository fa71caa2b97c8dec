//! What an earlier process left mounted, and what can be made of it. Pure.
//!
//! A FUSE mount says in its source which layer it serves ([`Subject`]), and its descriptor says in its name what was
//! agreed on with the kernel ([`Name`]); the source of a kernel's mount is a file of the layer. So nothing has to be
//! written down that could be lost or go stale.

use std::path::{Path, PathBuf};

use fuser::InitFlags;
use skimmer_proto::Digest;

/// What a mount's inode numbers and bytes are those of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    pub blob: Digest,
    pub diff_id: Digest,
    /// SHA-256 of the layer index, or of the table of contents in its place.
    pub index: Digest,
}

impl Subject {
    /// As the source of a mount: `skimmer:<blob>:<DiffID>:<index>`, in hex.
    pub fn source(&self) -> String {
        format!("skimmer:{}:{}:{}", self.blob.hex(), self.diff_id.hex(), self.index.hex())
    }

    pub fn parse(source: &Path) -> Option<Self> {
        let mut parts = source.to_str()?.strip_prefix("skimmer:")?.split(':');
        let mut digest = || format!("sha256:{}", parts.next()?).parse().ok();
        let subject = Self { blob: digest()?, diff_id: digest()?, index: digest()? };
        parts.next().is_none().then_some(subject)
    }
}

/// The blob of the layer whose inodes lie at `inodes`: `…/<SHA-256 in hex>/inodes`.
pub fn blob_of(inodes: &Path) -> Option<Digest> {
    let folder = inodes.parent()?.file_name()?.to_str()?;
    format!("sha256:{folder}").parse().ok()
}

/// The name under which a mount's descriptor is kept: `fuse.<place>.<id>.<flags in hex>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// Tells apart daemons that share a keeper.
    pub place: u32,
    pub id: u64,
    /// What the kernel offered and was taken.
    pub flags: InitFlags,
}

impl Name {
    /// The mounts in directory `root`.
    pub fn place_of(root: &Path) -> u32 {
        let digest = Digest::of(root.as_os_str().as_encoded_bytes());
        let [a, b, c, d, ..] = *digest.as_bytes();
        u32::from_be_bytes([a, b, c, d])
    }

    pub fn text(&self) -> String {
        format!("fuse.{:08x}.{}.{:x}", self.place, self.id, self.flags.bits())
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("fuse.")?.split('.');
        let place = u32::from_str_radix(parts.next()?, 16).ok()?;
        let id = parts.next()?.parse().ok()?;
        let flags = InitFlags::from_bits_retain(u64::from_str_radix(parts.next()?, 16).ok()?);
        parts.next().is_none().then_some(Self { place, id, flags })
    }
}

/// The name under which the descriptor of a data file is kept that is mounted before it is complete:
/// `prefill.<place>.<id>.<SHA-256 of the blob in hex>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataName {
    pub place: u32,
    pub id: u64,
    pub blob: Digest,
}

impl DataName {
    pub fn text(&self) -> String {
        format!("prefill.{:08x}.{}.{}", self.place, self.id, self.blob.hex())
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix("prefill.")?.split('.');
        let place = u32::from_str_radix(parts.next()?, 16).ok()?;
        let id = parts.next()?.parse().ok()?;
        let blob = format!("sha256:{}", parts.next()?).parse().ok()?;
        parts.next().is_none().then_some(Self { place, id, blob })
    }
}

/// What the record of a mount says that the kernel serves before it is complete: its [`Subject::source`]; in a second line
/// the id in the [`DataName`] under which its data file's descriptor is kept, its own unless an earlier mount has that
/// file, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    pub subject: Subject,
    pub kept: u64,
}

impl Record {
    pub fn text(&self) -> String {
        format!("{}\n{}\n", self.subject.source(), self.kept)
    }

    /// Of the mount `id`.
    pub fn parse(text: &str, id: u64) -> Option<Self> {
        let mut lines = text.lines();
        let subject = Subject::parse(Path::new(lines.next()?))?;
        let kept = lines.next().map_or(Some(id), |line| line.parse().ok())?;
        Some(Self { subject, kept })
    }
}

/// The names under which the group of events and their journal are kept.
pub fn prefill_names(place: u32, version: u32) -> [String; 2] {
    ["group".to_owned(), format!("journal-{version}")]
        .map(|what| format!("prefill.{place:08x}.{what}"))
}

/// The name under which the journal of requests to all mounts is kept.
pub fn requests_name(place: u32, version: u32) -> String {
    format!("fuse.{place:08x}.requests-{version}")
}

/// The file that says what is mounted at `path`, as long as that is incomplete and served by the kernel.
pub fn record_of(path: &Path) -> PathBuf {
    path.with_extension(RECORD)
}

/// The id of a mount whose record is at `path`.
pub fn recorded_id(root: &Path, path: &Path) -> Option<u64> {
    let is_record = path.extension().is_some_and(|extension| extension == RECORD);
    if is_record { id_of(root, &path.with_extension("")) } else { None }
}

const RECORD: &str = "lazy";

/// The id of a mount at `<root>/<decimal id>`.
pub fn id_of(root: &Path, mount_point: &Path) -> Option<u64> {
    let name = mount_point.strip_prefix(root).ok()?.to_str()?;
    let decimal = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    if decimal { name.parse().ok() } else { None }
}

/// Where a mount with `id` is.
pub fn path_of(root: &Path, id: u64) -> PathBuf {
    root.join(id.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_tells_what_is_mounted() {
        let digest = |text: &str| Digest::of(text.as_bytes());
        let subject = Subject { blob: digest("b"), diff_id: digest("d"), index: digest("i") };
        let source = subject.source();
        assert_eq!(Subject::parse(Path::new(&source)), Some(subject));
        for wrong in ["skimmer", "skimmer:", &source[..source.len() - 1], &format!("{source}:x")] {
            assert_eq!(Subject::parse(Path::new(wrong)), None, "{wrong}");
        }
        let inodes = format!("/c/layers-v1/{}/inodes", subject.blob.hex());
        assert_eq!(blob_of(Path::new(&inodes)), Some(subject.blob));
        assert_eq!(blob_of(Path::new("/dev/loop3")), None);
    }

    #[test]
    fn a_name_tells_what_was_agreed_on() {
        let place = Name::place_of(Path::new("/var/lib/skimmer/snapshots/m"));
        let flags = InitFlags::FUSE_HAS_RESEND | InitFlags::FUSE_ASYNC_READ;
        let name = Name { place, id: 17, flags };
        assert_eq!(Name::parse(&name.text()), Some(name));
        let requests = requests_name(place, 1);
        for wrong in [&requests, "fuse.1.2", "fuse.x.2.3", "fuse.1.2.3.4", "other.1.2.3", ""] {
            assert_eq!(Name::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn names_of_data_files_say_whose_they_are() {
        let name = DataName { place: 0xa0_0b1e, id: 9, blob: Digest::of(b"b") };
        assert_eq!(DataName::parse(&name.text()), Some(name));
        let names = prefill_names(name.place, 1);
        assert_eq!(names, ["prefill.00a00b1e.group", "prefill.00a00b1e.journal-1"]);
        for wrong in ["fuse.1.2.3", &names[0], &names[1], &format!("{}.x", name.text())] {
            assert_eq!(DataName::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_record_says_whose_descriptor_is_kept() {
        let [blob, diff_id, index] = [b"b", b"d", b"i"].map(|name| Digest::of(name));
        let record = Record { subject: Subject { blob, diff_id, index }, kept: 3 };
        assert_eq!(Record::parse(&record.text(), 9), Some(record));
        let short = record.subject.source();
        assert_eq!(Record::parse(&short, 9), Some(Record { kept: 9, ..record }));
        for wrong in ["", "skimmer:\n3\n", &format!("{short}\nx")] {
            assert_eq!(Record::parse(wrong, 9), None, "{wrong}");
        }
    }

    #[test]
    fn a_record_lies_beside_its_mount() {
        let root = Path::new("/s/m");
        let record = record_of(&path_of(root, 12));
        assert_eq!(record, Path::new("/s/m/12.lazy"));
        assert_eq!(recorded_id(root, &record), Some(12));
        assert_eq!(recorded_id(root, Path::new("/s/m/12")), None);
        assert_eq!(id_of(root, &record), None);
    }

    #[test]
    fn only_decimal_names_are_mounts() {
        let root = Path::new("/s/m");
        for (path, id) in [
            ("/s/m/7", Some(7)),
            ("/s/m/7/x", None),
            ("/s/m", None),
            ("/s/m/+7", None),
            ("/s/m/x", None),
            ("/t/m/7", None),
        ] {
            assert_eq!(id_of(root, Path::new(path)), id, "{path}");
        }
    }
}
