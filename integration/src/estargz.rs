//! Layers in eStargz: gzip members that begin at files' contents, and a table of them at the end
//! (stargz-snapshotter's `docs/estargz.md`).

use std::path::Path;

use serde_json::{Value, json};
use skimmer_proto::Digest;

use crate::layer::{Blob, Format, Layer, gzip};
use crate::tar::{Header, Tar};

/// A layer of directories (names that end in `/`) and files.
pub fn layer(entries: &[(&str, &[u8])], folder: &Path) -> anyhow::Result<Layer> {
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
    let start = writer.blob.len();
    let table = json!({ "version": 1, "entries": table }).to_string();
    writer.pending = Tar::new().file("stargz.index.json", table.as_bytes()).end();
    writer.flush()?;
    // An empty member whose extra field leads to the table.
    writer.blob.extend_from_slice(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    writer.blob.extend_from_slice(format!("{start:016x}STARGZ").as_bytes());
    writer.blob.extend_from_slice(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    let diff_id = Digest::of(&writer.tar);
    Ok(Layer { blob: Blob::of(&writer.blob, folder)?, diff_id, format: Format::Gzip })
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
