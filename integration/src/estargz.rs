//! Layers in eStargz: gzip members that begin at files' contents, and a table of them at the end
//! (stargz-snapshotter's `docs/estargz.md`).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use skimmer_proto::Digest;

use crate::layer::{Format, Layer, gzip};
use crate::tar::{Header, Tar};

/// Where a manifest gives the SHA-256 of the table.
const ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";

/// A layer of directories (names that end in `/`) and files.
pub fn layer(entries: &[(&str, &[u8])], folder: &Path) -> anyhow::Result<Layer> {
    lying(entries, |_| {}, folder)
}

/// The same with a table whose entries went through `lie`.
pub fn lying(
    entries: &[(&str, &[u8])],
    lie: impl FnOnce(&mut [Value]),
    folder: &Path,
) -> anyhow::Result<Layer> {
    let mut writer = Writer::default();
    let mut table: Vec<Value> = Vec::new();
    for (name, data) in entries {
        let directory = name.ends_with('/');
        let mut header = Header::new(name, if directory { b'5' } else { b'0' });
        header.size = data.len() as u64;
        let (mode, kind) = if directory { (0o755, "dir") } else { (0o644, "reg") };
        let mut entry =
            json!({ "name": name, "type": kind, "mode": mode, "modtime": "2020-09-13T12:26:40Z" });
        writer.pending.extend_from_slice(&header.block());
        if !data.is_empty() {
            writer.flush()?;
            let digest = Digest::of(data).to_string();
            entry["size"] = data.len().into();
            entry["offset"] = writer.blob.len().into();
            entry["digest"] = digest.clone().into();
            entry["chunkDigest"] = digest.into();
            writer.pending.extend_from_slice(&Tar::new().raw(data).cut());
        }
        table.push(entry);
    }
    writer.flush()?;
    lie(&mut table);
    let start = writer.blob.len();
    let table = json!({ "version": 1, "entries": table }).to_string();
    writer.pending = Tar::new().file("stargz.index.json", table.as_bytes()).end();
    writer.flush()?;
    // An empty member whose extra field leads to the table.
    writer.blob.extend_from_slice(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    writer.blob.extend_from_slice(format!("{start:016x}STARGZ").as_bytes());
    writer.blob.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    let layer = Layer::new(&writer.blob, Digest::of(&writer.tar), Format::Gzip, folder)?;
    let digest = Digest::of(table.as_bytes()).to_string();
    Ok(Layer { annotations: BTreeMap::from([(ANNOTATION.to_owned(), digest)]), ..layer })
}

#[derive(Default)]
struct Writer {
    blob: Vec<u8>,
    tar: Vec<u8>,
    /// Of the tar stream, not yet in a member.
    pending: Vec<u8>,
}

impl Writer {
    fn flush(&mut self) -> anyhow::Result<()> {
        self.blob.extend_from_slice(&gzip(&self.pending)?);
        self.tar.append(&mut self.pending);
        Ok(())
    }
}
