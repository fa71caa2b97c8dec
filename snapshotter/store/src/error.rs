//! What can go wrong in the metadata database.

use std::io;
use std::path::PathBuf;

use rocksdb::ErrorKind;

/// A failed operation on the metadata database.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make the folder of the metadata database {path}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("open the metadata database {path}")]
    Open { path: PathBuf, source: rocksdb::Error },
    #[error("set the damaged metadata database {path} aside")]
    SetAside { path: PathBuf, source: io::Error },
    #[error("delete the metadata database of an earlier version, {path}")]
    Earlier { path: PathBuf, source: io::Error },
    #[error("read the metadata database from end to end")]
    Scan(#[source] rocksdb::Error),
    #[error("read from table {table}")]
    Read { table: &'static str, source: rocksdb::Error },
    #[error("write to the metadata database")]
    Write(#[source] rocksdb::Error),
    #[error("flush the metadata database")]
    Flush(#[source] rocksdb::Error),
}

impl Error {
    /// Whether the database's own files are damaged or missing, so that trying again can't help.
    pub fn is_damage(&self) -> bool {
        let source = match self {
            Self::Folder { .. } | Self::SetAside { .. } | Self::Earlier { .. } => return false,
            Self::Open { source, .. } | Self::Read { source, .. } => source,
            Self::Scan(source) | Self::Write(source) | Self::Flush(source) => source,
        };
        match source.kind() {
            ErrorKind::Corruption | ErrorKind::NotFound => true,
            // RocksDB says so of a file that another of its files names.
            ErrorKind::IOError => source.as_ref().contains("No such file or directory"),
            _ => false,
        }
    }
}
