//! Making folders and database agree when the daemon starts.
//!
//! The database leads: a folder that it doesn't know is left over from a crash and goes, a record
//! in a folder that differs is written again. Only a database that never held a snapshot follows
//! the folders, because then it was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use tracing::{info, warn};

use super::Error;
use crate::folders::Folders;
use crate::records::{Change, Records};
use crate::{Kind, Snapshot};

/// What the start found to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Snapshots entered into an empty database.
    pub restored: usize,
    /// Folders given up: unknown to the database, or of no use to a new one.
    pub discarded: usize,
    /// Records written again in folders.
    pub rewritten: usize,
}

pub(super) fn reconcile(folders: &Folders, records: &dyn Records) -> Result<Rebuilt, Error> {
    let done =
        if records.next_id()? == 1 { restore(folders, records)? } else { agree(folders, records)? };
    if done != Rebuilt::default() {
        let Rebuilt { restored, discarded, rewritten } = done;
        info!(restored, discarded, rewritten, "snapshot folders and database made to agree");
    }
    Ok(done)
}

/// Fills an empty database from the folders.
fn restore(folders: &Folders, records: &dyn Records) -> Result<Rebuilt, Error> {
    let mut done = Rebuilt::default();
    let mut found: BTreeMap<u64, Snapshot> = BTreeMap::new();
    for id in folders.ids()? {
        match folders.read(id) {
            Ok(snapshot) if snapshot.id == id => drop(found.insert(id, snapshot)),
            Ok(_) => warn!(id, "a snapshot folder holds another snapshot's record"),
            Err(error) => warn!(
                id,
                error = &error as &dyn std::error::Error,
                "a snapshot folder has no readable record"
            ),
        }
        if !found.contains_key(&id) {
            folders.discard(id)?;
            done.discarded += 1;
        }
    }
    for id in usable(&found) {
        if let Some(snapshot) = found.remove(&id) {
            records.apply(&Change::Create(snapshot))?;
            done.restored += 1;
        }
    }
    for (id, snapshot) in found {
        warn!(
            id,
            snapshot = snapshot.name,
            parent = snapshot.parent,
            "snapshot cannot be restored"
        );
        folders.discard(id)?;
        done.discarded += 1;
    }
    Ok(done)
}

/// The ids of snapshots with a unique name whose chain of parents is complete and committed,
/// parents before children.
fn usable(found: &BTreeMap<u64, Snapshot>) -> Vec<u64> {
    let mut by_name: BTreeMap<&str, &Snapshot> = BTreeMap::new();
    // Of two with one name, the newer folder is the later truth.
    for snapshot in found.values() {
        by_name.insert(&snapshot.name, snapshot);
    }
    let mut children: BTreeMap<&str, Vec<&Snapshot>> = BTreeMap::new();
    for snapshot in by_name.values() {
        children.entry(&snapshot.parent).or_default().push(snapshot);
    }
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next: Vec<&str> = vec![""];
    while let Some(parent) = next.pop() {
        for child in children.get(parent).into_iter().flatten() {
            if child.name.is_empty() || !seen.insert(child.id) {
                continue;
            }
            order.push(child.id);
            if child.kind == Kind::Committed {
                next.push(&child.name);
            }
        }
    }
    order
}

/// Makes the folders follow the database.
fn agree(folders: &Folders, records: &dyn Records) -> Result<Rebuilt, Error> {
    let mut done = Rebuilt::default();
    let mut known: BTreeMap<u64, Snapshot> = BTreeMap::new();
    records.visit(&mut |snapshot| {
        known.insert(snapshot.id, snapshot);
        ControlFlow::Continue(())
    })?;
    for id in folders.ids()? {
        match known.remove(&id) {
            None => {
                folders.discard(id)?;
                done.discarded += 1;
            }
            Some(snapshot) if folders.read(id).ok().as_ref() != Some(&snapshot) => {
                folders.record(&snapshot)?;
                done.rewritten += 1;
            }
            Some(_) => {}
        }
    }
    for snapshot in known.values() {
        warn!(id = snapshot.id, snapshot = snapshot.name, "the snapshot's folder is missing");
    }
    Ok(done)
}
