//! What can go wrong in the metadata database.

use std::io;
use std::path::PathBuf;

/// A failed operation on the metadata database.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make the folder of the metadata database {path}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("open the metadata database {path}")]
    Open { path: PathBuf, source: rocksdb::Error },
    #[error("set the damaged metadata database {path} aside")]
    SetAside { path: PathBuf, source: io::Error },
    #[error("read from table {table}")]
    Read { table: &'static str, source: rocksdb::Error },
    #[error("write to the metadata database")]
    Write(#[source] rocksdb::Error),
    #[error("flush the metadata database")]
    Flush(#[source] rocksdb::Error),
}

impl Error {
    /// Whether the database's own files are damaged, so that trying again can't help.
    pub fn is_damage(&self) -> bool {
        let source = match self {
            Self::Folder { .. } | Self::SetAside { .. } => return false,
            Self::Open { source, .. } | Self::Read { source, .. } => source,
            Self::Write(source) | Self::Flush(source) => source,
        };
        source.kind() == rocksdb::ErrorKind::Corruption
    }
}
