//! [`Records`] in the node's database.
//!
//! Tables (a *text* in a key is its length as four big-endian bytes, then its bytes):
//! - `snapshots`: name → [`Snapshot`] in JSON;
//! - `snapshots.children`: text parent, name of the child → nothing;
//! - `snapshots.claims`: text chain ID, text parent, name → nothing;
//! - `snapshots.layers`: 32 bytes of the blob's SHA-256, name → nothing;
//! - `snapshots.usage`: id (8 bytes, big-endian) → [`Usage`] in JSON;
//! - `snapshots.ids`: `last` → the highest id ever used (8 bytes, big-endian).
//!
//! Invariant: a row of the other tables exists exactly if the snapshot's record calls for it.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use skimmer_proto::Digest;
use skimmer_store::{Batch, Store, Sync, Table};

use super::{Change, Error, Records};
use crate::{Snapshot, Usage};

const LAST_ID: &[u8] = b"last";

pub struct Stored {
    store: Store,
    snapshots: Table,
    children: Table,
    claims: Table,
    layers: Table,
    usage: Table,
    ids: Table,
}

impl Stored {
    pub fn new(store: &Store) -> Self {
        Self {
            snapshots: store.table("snapshots"),
            children: store.table("snapshots.children"),
            claims: store.table("snapshots.claims"),
            layers: store.table("snapshots.layers"),
            usage: store.table("snapshots.usage"),
            ids: store.table("snapshots.ids"),
            store: store.clone(),
        }
    }

    fn names(&self, table: &Table, prefix: &[u8]) -> Result<Vec<String>, Error> {
        table
            .scan(prefix)
            .map(|row| {
                let (key, _) = row.map_err(Error::List)?;
                let name = key.get(prefix.len()..).unwrap_or_default();
                Ok(String::from_utf8_lossy(name).into_owned())
            })
            .collect()
    }

    fn any(&self, table: &Table, prefix: &[u8]) -> Result<bool, Error> {
        Ok(table.scan(prefix).next().transpose().map_err(Error::List)?.is_some())
    }

    fn insert(&self, batch: &mut Batch, new: &Snapshot) -> Result<(), Error> {
        let value = serde_json::to_vec(new)
            .map_err(|source| Error::Encode { name: new.name.clone(), source })?;
        batch.put(&self.snapshots, new.name.as_bytes(), &value);
        for (table, key) in self.rows(new) {
            batch.put(table, &key, b"");
        }
        Ok(())
    }

    fn erase(&self, batch: &mut Batch, old: &Snapshot) {
        batch.delete(&self.snapshots, old.name.as_bytes());
        for (table, key) in self.rows(old) {
            batch.delete(table, &key);
        }
    }

    /// The index rows that a record calls for.
    fn rows(&self, snapshot: &Snapshot) -> Vec<(&Table, Vec<u8>)> {
        let name = snapshot.name.as_bytes();
        let mut rows = Vec::new();
        if !snapshot.parent.is_empty() {
            rows.push((&self.children, [&text(&snapshot.parent), name].concat()));
        }
        if let Some(reference) = snapshot.reference() {
            rows.push((&self.claims, [&claim(reference, &snapshot.parent), name].concat()));
        }
        if let Some(layer) = &snapshot.layer {
            rows.push((&self.layers, [layer.blob.digest.as_bytes(), name].concat()));
        }
        rows
    }
}

impl Records for Stored {
    fn get(&self, name: &str) -> Result<Option<Snapshot>, Error> {
        let value = self
            .snapshots
            .get(name.as_bytes())
            .map_err(|source| Error::Read { name: name.to_owned(), source })?;
        value.map(|value| decode(name, &value)).transpose()
    }

    fn has_children(&self, parent: &str) -> Result<bool, Error> {
        self.any(&self.children, &text(parent))
    }

    fn children(&self, parent: &str) -> Result<Vec<String>, Error> {
        if parent.is_empty() {
            let mut names = Vec::new();
            self.visit(&mut |snapshot| {
                if snapshot.parent.is_empty() {
                    names.push(snapshot.name);
                }
                ControlFlow::Continue(())
            })?;
            return Ok(names);
        }
        self.names(&self.children, &text(parent))
    }

    fn claiming(&self, reference: &str, parent: &str) -> Result<Vec<String>, Error> {
        self.names(&self.claims, &claim(reference, parent))
    }

    fn uses_layer(&self, blob: &Digest) -> Result<bool, Error> {
        self.any(&self.layers, blob.as_bytes())
    }

    fn visit(&self, visit: &mut dyn FnMut(Snapshot) -> ControlFlow<()>) -> Result<(), Error> {
        for row in self.snapshots.scan(b"") {
            let (name, value) = row.map_err(Error::List)?;
            if visit(decode(&String::from_utf8_lossy(&name), &value)?).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn next_id(&self) -> Result<u64, Error> {
        let last = self.ids.get(LAST_ID).map_err(Error::List)?;
        let last = last.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
        Ok(last + 1)
    }

    fn apply(&self, change: &Change) -> Result<(), Error> {
        let mut batch = self.store.batch();
        let name = match change {
            Change::Create(new) => {
                let last = new.id.max(self.next_id()? - 1);
                batch.put(&self.ids, LAST_ID, &last.to_be_bytes());
                self.insert(&mut batch, new)?;
                &new.name
            }
            Change::Replace { old, new } => {
                self.erase(&mut batch, old);
                self.insert(&mut batch, new)?;
                &new.name
            }
            Change::Remove(old) => {
                self.erase(&mut batch, old);
                batch.delete(&self.usage, &old.id.to_be_bytes());
                &old.name
            }
        };
        batch.write(Sync::Now).map_err(|source| Error::Write { name: name.clone(), source })
    }

    fn is_sound(&self) -> Result<bool, Error> {
        let mut expected = BTreeSet::new();
        for row in self.snapshots.scan(b"") {
            let (name, value) = row.map_err(Error::List)?;
            match decode(&String::from_utf8_lossy(&name), &value) {
                Ok(snapshot) if snapshot.name.as_bytes() == name => {
                    let rows = self.rows(&snapshot).into_iter();
                    expected.extend(rows.map(|(table, key)| (table.name(), key)));
                }
                _ => return Ok(false),
            }
        }
        for table in [&self.children, &self.claims, &self.layers] {
            for row in table.scan(b"") {
                let (key, _) = row.map_err(Error::List)?;
                if !expected.remove(&(table.name(), key)) {
                    return Ok(false);
                }
            }
        }
        Ok(expected.is_empty())
    }

    fn replace_all(&self, snapshots: &[Snapshot], last_id: u64) -> Result<(), Error> {
        let mut batch = self.store.batch();
        for table in [&self.snapshots, &self.children, &self.claims, &self.layers, &self.usage] {
            for row in table.scan(b"") {
                batch.delete(table, &row.map_err(Error::List)?.0);
            }
        }
        for snapshot in snapshots {
            self.insert(&mut batch, snapshot)?;
        }
        batch.put(&self.ids, LAST_ID, &last_id.to_be_bytes());
        batch.write(Sync::Now).map_err(Error::ReplaceAll)
    }

    fn usage(&self, id: u64) -> Result<Option<Usage>, Error> {
        let value = self.usage.get(&id.to_be_bytes()).map_err(Error::List)?;
        Ok(value.and_then(|value| serde_json::from_slice(&value).ok()))
    }

    fn remember_usage(&self, id: u64, usage: Usage) -> Result<(), Error> {
        let name = || format!("usage of {id}");
        let value =
            serde_json::to_vec(&usage).map_err(|source| Error::Encode { name: name(), source })?;
        self.usage
            .put(&id.to_be_bytes(), &value, Sync::Later)
            .map_err(|source| Error::Write { name: name(), source })
    }
}

fn decode(name: &str, value: &[u8]) -> Result<Snapshot, Error> {
    serde_json::from_slice(value).map_err(|source| Error::Decode { name: name.to_owned(), source })
}

fn text(text: &str) -> Vec<u8> {
    // gRPC messages are capped at 16 MiB, so a length always fits.
    let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes(), text.as_bytes()].concat()
}

fn claim(reference: &str, parent: &str) -> Vec<u8> {
    [text(reference), text(parent)].concat()
}
