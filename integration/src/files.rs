//! Files that others read meanwhile.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

/// Has `file` hold `bytes` from now on; nobody ever finds a part of them.
pub fn replace(file: &Path, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let new = file.with_extension("new");
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, file))
        .with_context(|| format!("replace {}", file.display()))
}
