//! Layers too large for memory: a tar stream that goes through pigz as it is written.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};
use skimmer_proto::Digest;

use crate::ctr::unique;
use crate::layer::{Blob, Format, Layer};

/// A gzip layer under construction: what is written is its tar stream.
pub struct Streamed {
    pigz: Child,
    input: ChildStdin,
    hash: Sha256,
    path: PathBuf,
}

impl Streamed {
    /// The blob is made in `folder`.
    pub fn new(folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("streamed-{}", unique()));
        let output = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let mut command = Command::new("pigz");
        command.args(["-1", "--stdout", "--no-name"]).stdin(Stdio::piped()).stdout(output);
        let mut pigz = command.spawn().context("start pigz")?;
        let input = pigz.stdin.take().context("pigz has no standard input")?;
        Ok(Self { pigz, input, hash: Sha256::new(), path })
    }

    pub fn finish(self) -> anyhow::Result<Layer> {
        let Self { mut pigz, input, hash, path } = self;
        drop(input);
        let status = pigz.wait().context("wait for pigz")?;
        anyhow::ensure!(status.success(), "pigz ended with {status}");
        let diff_id = Digest::from_bytes(hash.finalize().into());
        Ok(Layer {
            blob: Blob::of_file(&path)?,
            diff_id,
            format: Format::Gzip,
            annotations: Default::default(),
        })
    }
}

impl Write for Streamed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.input.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.input.flush()
    }
}
