//! Changes that are made together.

use rocksdb::{WriteBatch, WriteOptions};

use crate::{Error, Store, Table};

/// When a write has to be on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// Before the call returns: survives a loss of power.
    Now,
    /// Eventually: survives the end of the process at once, a loss of power only after a while.
    Later,
}

impl Sync {
    pub(crate) fn options(self) -> WriteOptions {
        let mut options = WriteOptions::default();
        options.set_sync(self == Self::Now);
        options
    }
}

/// Changes that are made whole or not at all, in the order given.
pub struct Batch {
    store: Store,
    changes: WriteBatch,
}

impl Batch {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, changes: WriteBatch::default() }
    }

    pub fn put(&mut self, table: &Table, key: &[u8], value: &[u8]) {
        self.changes.put(table.full_key(key), value);
    }

    pub fn delete(&mut self, table: &Table, key: &[u8]) {
        self.changes.delete(table.full_key(key));
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    pub fn write(self, sync: Sync) -> Result<(), Error> {
        self.store.db.write_opt(self.changes, &sync.options()).map_err(Error::Write)
    }
}
