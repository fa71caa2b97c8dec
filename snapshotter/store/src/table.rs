//! A table: the keys of one stage, kept apart from everybody else's by a prefix.
//!
//! A key in the database is the table's name, a NUL byte, and the key in the table.

use rocksdb::{DBIterator, IteratorMode, PrefixRange, ReadOptions};

use crate::{Error, Store, Sync};

/// Keys and values of one owner, ordered by key (as bytes). Cheap to clone.
#[derive(Clone)]
pub struct Table {
    store: Store,
    name: &'static str,
}

impl Table {
    pub(crate) fn new(store: Store, name: &'static str) -> Self {
        Self { store, name }
    }

    pub const fn name(&self) -> &'static str {
        self.name
    }

    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        self.store.db.get(self.full_key(key)).map_err(|source| self.unread(source))
    }

    pub fn contains(&self, key: &[u8]) -> Result<bool, Error> {
        let found = self.store.db.get_pinned(self.full_key(key));
        Ok(found.map_err(|source| self.unread(source))?.is_some())
    }

    pub fn put(&self, key: &[u8], value: &[u8], sync: Sync) -> Result<(), Error> {
        self.store.db.put_opt(self.full_key(key), value, &sync.options()).map_err(Error::Write)
    }

    /// Deletes `key` if it is there.
    pub fn delete(&self, key: &[u8], sync: Sync) -> Result<(), Error> {
        self.store.db.delete_opt(self.full_key(key), &sync.options()).map_err(Error::Write)
    }

    /// The rows whose keys start with `prefix` (all, if it is empty), in order, as they were when
    /// the call was made.
    pub fn scan(&self, prefix: &[u8]) -> Rows<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(PrefixRange(self.full_key(prefix)));
        let rows = self.store.db.iterator_opt(IteratorMode::Start, options);
        Rows { table: self, rows }
    }

    pub fn is_empty(&self) -> Result<bool, Error> {
        Ok(self.scan(b"").next().transpose()?.is_none())
    }

    pub(crate) fn full_key(&self, key: &[u8]) -> Vec<u8> {
        [self.name.as_bytes(), b"\0", key].concat()
    }

    fn unread(&self, source: rocksdb::Error) -> Error {
        Error::Read { table: self.name, source }
    }
}

/// An ordered walk over a table: pairs of key (without the table's prefix) and value.
pub struct Rows<'a> {
    table: &'a Table,
    rows: DBIterator<'a>,
}

impl Iterator for Rows<'_> {
    type Item = Result<(Vec<u8>, Vec<u8>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let row = self.rows.next()?;
        let prefix = self.table.name.len() + 1;
        Some(
            row.map_err(|source| self.table.unread(source)).map(|(key, value)| {
                (key.get(prefix..).unwrap_or_default().to_vec(), value.into_vec())
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("db")).unwrap();
        (folder, store)
    }

    #[test]
    fn tables_do_not_see_each_other() {
        let (_folder, store) = open();
        let (a, b) = (store.table("a"), store.table("ab"));
        a.put(b"bx", b"1", Sync::Later).unwrap();
        a.put(b"", b"empty key", Sync::Later).unwrap();
        b.put(b"x", b"2", Sync::Now).unwrap();
        assert_eq!(a.get(b"bx").unwrap().as_deref(), Some(&b"1"[..]));
        assert_eq!(a.get(b"").unwrap().as_deref(), Some(&b"empty key"[..]));
        assert_eq!(b.get(b"x").unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(a.get(b"x").unwrap(), None);
        assert_eq!(a.scan(b"").count(), 2);
        assert!(store.table("c").is_empty().unwrap());
    }

    #[test]
    fn scans_by_prefix_in_order() {
        let (_folder, store) = open();
        let table = store.table("t");
        for key in [&b"b\xff"[..], b"a", b"b", b"b\xff\xff", b"c"] {
            table.put(key, key, Sync::Later).unwrap();
        }
        let keys = |prefix: &[u8]| -> Vec<Vec<u8>> {
            table.scan(prefix).map(|row| row.unwrap().0).collect()
        };
        assert_eq!(keys(b"b"), [&b"b"[..], b"b\xff", b"b\xff\xff"]);
        assert_eq!(keys(b"b\xff"), [&b"b\xff"[..], b"b\xff\xff"]);
        assert_eq!(keys(b"").len(), 5);
        assert!(keys(b"d").is_empty());
    }

    #[test]
    fn a_batch_is_written_whole_and_survives_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let table = store.table("t");
        table.put(b"old", b"1", Sync::Later).unwrap();
        let mut batch = store.batch();
        assert!(batch.is_empty());
        batch.put(&table, b"new", b"2");
        batch.delete(&table, b"old");
        assert!(!table.contains(b"new").unwrap());
        batch.write(Sync::Now).unwrap();
        drop((table, store));
        let table = Store::open(folder.path()).unwrap().table("t");
        assert!(table.contains(b"new").unwrap());
        assert!(!table.contains(b"old").unwrap());
    }

    #[test]
    fn a_second_process_is_refused() {
        let (folder, _store) = open();
        let error = Store::open(&folder.path().join("db")).err().unwrap();
        assert!(!error.is_damage(), "{error}");
    }
}
