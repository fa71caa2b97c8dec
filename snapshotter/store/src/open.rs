//! Opening the database with bounded memory and few files, or a new one where it is beyond use.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, IteratorMode, LogLevel, Options};

use crate::{Batch, Error, Table};

/// Read cache for blocks of table files. The metadata of a busy node is a few MiB.
const BLOCK_CACHE_BYTES: usize = 2 << 20;
/// Writes gathered in memory before they become a table file; at most two such buffers exist.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// The write-ahead log is cut (and buffers flushed) beyond this.
const WAL_BYTES: u64 = 8 << 20;
const OPEN_FILES: i32 = 64;
const LOG_BYTES: usize = 1 << 20;

/// The database's folder. A format of tables that this version can't read has another name.
const FOLDER: &str = "store-v1";
/// Folders of earlier versions; what they held can be had from elsewhere.
const EARLIER: [&str; 1] = ["store"];

/// The node's metadata database. Cheap to clone; the database closes with the last clone.
#[derive(Clone)]
pub struct Store {
    pub(crate) db: Arc<DB>,
}

impl Store {
    /// Opens the database in folder `path`, making both if they aren't there. One process at a time:
    /// a second one gets an error that names the lock file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        fs::create_dir_all(path)
            .map_err(|source| Error::Folder { path: path.to_owned(), source })?;
        let db = DB::open(&options(), path)
            .map_err(|source| Error::Open { path: path.to_owned(), source })?;
        Ok(Self { db: Arc::new(db) })
    }

    /// Opens the database below `root`, whatever has become of it: one that is damaged or incomplete is
    /// renamed to `<folder>.damaged` (replacing an earlier one) and an empty one opened; the second
    /// value says where it went. Databases of earlier versions are deleted. Reads every row.
    pub fn open_or_replace(root: &Path) -> Result<(Self, Option<PathBuf>), Error> {
        for path in EARLIER.map(|name| root.join(name)) {
            if path.exists() {
                fs::remove_dir_all(&path).map_err(|source| Error::Earlier { path, source })?;
            }
        }
        let path = root.join(FOLDER);
        let opened = Self::open(&path).and_then(|store| store.read_through().map(|()| store));
        match opened {
            Ok(store) => Ok((store, None)),
            Err(error) if error.is_damage() => {
                let aside = path.with_extension("damaged");
                let failed = |source| Error::SetAside { path: path.clone(), source };
                if aside.exists() {
                    fs::remove_dir_all(&aside).map_err(failed)?;
                }
                fs::rename(&path, &aside).map_err(failed)?;
                Ok((Self::open(&path)?, Some(aside)))
            }
            Err(error) => Err(error),
        }
    }

    /// Finds damage in parts that opening doesn't look at.
    fn read_through(&self) -> Result<(), Error> {
        let all = self.db.iterator(IteratorMode::Start);
        all.into_iter().try_for_each(|row| row.map(drop).map_err(Error::Scan))
    }

    /// The table called `name`: a constant of the stage that owns the table, without NUL bytes.
    pub fn table(&self, name: &'static str) -> Table {
        Table::new(self.clone(), name)
    }

    /// An empty batch of changes, to any tables.
    pub fn batch(&self) -> Batch {
        Batch::new(self.clone())
    }

    /// Makes everything written so far durable, whatever each write asked for.
    pub fn flush(&self) -> Result<(), Error> {
        self.db.flush_wal(true).map_err(Error::Flush)
    }
}

fn options() -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&blocks);
    options.set_compression_type(DBCompressionType::None);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(WAL_BYTES);
    options.set_max_open_files(OPEN_FILES);
    options.set_table_cache_num_shard_bits(2);
    options.set_max_background_jobs(2);
    options.set_max_file_opening_threads(1);
    options.set_max_manifest_file_size(LOG_BYTES);
    options.set_max_log_file_size(LOG_BYTES);
    options.set_keep_log_file_num(2);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    options
}
