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
        for wrong in ["fuse.1.2", "fuse.x.2.3", "fuse.1.2.3.4", "other.1.2.3", ""] {
            assert_eq!(Name::parse(wrong), None, "{wrong}");
        }
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
