//! Layers of test images: a tar stream in each compression that images come in.

use std::collections::BTreeMap;
use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};
use skimmer_proto::Digest;

/// How a layer's tar stream is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Plain,
    Gzip,
    /// This many gzip members of equal decoded length, one after another.
    GzipMembers(usize),
    Zstd,
    /// Gzip, but said to be had elsewhere than in the registry.
    Foreign,
}

/// Bytes in a file, and their name.
#[derive(Clone, Debug)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
    pub path: PathBuf,
}

/// A layer as an image refers to it. Its parts may be set at will, also to lies.
#[derive(Clone, Debug)]
pub struct Layer {
    pub blob: Blob,
    pub diff_id: Digest,
    pub format: Format,
    /// Of its descriptor in the manifest.
    pub annotations: BTreeMap<String, String>,
}

impl Blob {
    /// Stores `bytes` in `folder`.
    pub fn of(bytes: &[u8], folder: &Path) -> anyhow::Result<Self> {
        let digest = Digest::of(bytes);
        std::fs::create_dir_all(folder)?;
        let path = folder.join(digest.hex());
        std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
        Ok(Self { digest, size: bytes.len() as u64, path })
    }

    /// Names a file that exists.
    pub fn of_file(path: &Path) -> anyhow::Result<Self> {
        let (digest, size) = digest_of(&mut std::fs::File::open(path)?)?;
        Ok(Self { digest, size, path: path.to_owned() })
    }

    pub fn bytes(&self) -> anyhow::Result<Vec<u8>> {
        std::fs::read(&self.path).with_context(|| format!("read {}", self.path.display()))
    }
}

impl Layer {
    /// A layer of the tar stream `tar`, its blob stored in `folder`.
    pub fn of(tar: &[u8], format: Format, folder: &Path) -> anyhow::Result<Self> {
        let bytes = match format {
            Format::Plain => tar.to_vec(),
            Format::Gzip | Format::Foreign => gzip(tar)?,
            Format::GzipMembers(count) => {
                let span = tar.len().div_ceil(count.max(1)).max(1);
                let members: Result<Vec<_>, _> = tar.chunks(span).map(gzip).collect();
                members?.concat()
            }
            Format::Zstd => zstd::encode_all(tar, 3)?,
        };
        Self::new(&bytes, Digest::of(tar), format, folder)
    }

    /// A layer whose blob is `bytes`, stored in `folder`, and whose DiffID is `diff_id`, true or not.
    pub fn new(
        bytes: &[u8],
        diff_id: Digest,
        format: Format,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        Ok(Self { blob: Blob::of(bytes, folder)?, diff_id, format, annotations: BTreeMap::new() })
    }

    /// Its media type, `oci` or Docker's.
    pub fn media_type(&self, oci: bool) -> &'static str {
        match (oci, self.format) {
            (true, Format::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (true, Format::Gzip | Format::GzipMembers(_)) => {
                "application/vnd.oci.image.layer.v1.tar+gzip"
            }
            (_, Format::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (true, Format::Foreign) => {
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            }
            (false, Format::Foreign) => "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            (false, Format::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (false, Format::Gzip | Format::GzipMembers(_)) => {
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
        }
    }
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// The digest and the length of everything that `input` gives.
pub fn digest_of(input: &mut impl Read) -> anyhow::Result<(Digest, u64)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut length = 0;
    loop {
        let count = input.read(&mut buffer)?;
        if count == 0 {
            return Ok((Digest::from_bytes(hash.finalize().into()), length));
        }
        hash.update(&buffer[..count]);
        length += count as u64;
    }
}

/// Bytes without structure, the same for the same `seed`: gzip and zstd can't shrink them.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
