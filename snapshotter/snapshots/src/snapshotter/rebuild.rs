//! Making folders and database agree when the daemon starts.
//!
//! The folders lead: a snapshot is what has a folder with a record in it, because those are written
//! first and lose nothing with the database, which may be gone, damaged, or an older one than it was.
//! What a crash left half done is thereby done: a snapshot that nobody was told of is listed, and
//! containerd takes away what it doesn't know; one whose folder has gone is forgotten.
//!
//! Two exceptions. Of a record in both, the one changed last counts: a power cut may have lost the
//! folder's. And a parent that the database knows is kept as long as there are children.
//!
//! A folder that makes no sense stays as it is, for a person to look at: a container may be using it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use tracing::{error, info, warn};

use super::Error;
use crate::folders::{self, Content, Folders};
use crate::records::Records;
use crate::{Kind, Snapshot};

/// What the start found to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Snapshots that the database didn't know, or not like this.
    pub restored: usize,
    /// Snapshots that the database knew and that have no folder.
    pub dropped: usize,
    /// Folders given up: half made, or superseded.
    pub discarded: usize,
    /// Records written again in folders.
    pub rewritten: usize,
    /// Folders that stay, and are no snapshots.
    pub left: usize,
}

type ById = BTreeMap<u64, Snapshot>;

pub(super) fn reconcile(folders: &Folders, records: &dyn Records) -> Result<Rebuilt, Error> {
    let known = if records.is_sound()? { Some(all(records)?) } else { None };
    if known.is_none() {
        error!("the database of snapshots is damaged; rebuilding it from their folders");
    }
    let known_now = known.clone().unwrap_or_default();
    let mut done = Rebuilt::default();
    let mut found = read(folders, &known_now, &mut done)?;
    supersede(folders, &mut found, &mut done)?;
    keep_parents(folders, &known_now, &mut found, &mut done)?;
    let order = usable(&found);
    for (id, snapshot) in &found {
        if !order.contains(id) {
            let (name, parent) = (&snapshot.name, &snapshot.parent);
            error!(
                id,
                name,
                parent,
                "a snapshot without its parents cannot be used; its folder is left alone"
            );
            done.left += 1;
        }
    }
    found.retain(|id, _| order.contains(id));
    let last_id = folders.last_id()?.max(records.next_id().unwrap_or(1) - 1);
    if known.as_ref() != Some(&found) || records.next_id()? <= last_id {
        done.restored += found.values().filter(|s| known_now.get(&s.id) != Some(*s)).count();
        done.dropped += known_now.keys().filter(|id| !found.contains_key(id)).count();
        let all: Vec<Snapshot> = found.into_values().collect();
        records.replace_all(&all, last_id)?;
    }
    if done != Rebuilt::default() {
        let Rebuilt { restored, dropped, discarded, rewritten, left } = done;
        info!(
            restored,
            dropped, discarded, rewritten, left, "snapshot folders and database made to agree"
        );
    }
    Ok(done)
}

fn all(records: &dyn Records) -> Result<ById, Error> {
    let mut known = BTreeMap::new();
    records.visit(&mut |snapshot| {
        known.insert(snapshot.id, snapshot);
        ControlFlow::Continue(())
    })?;
    Ok(known)
}

/// The snapshots that have folders. `known`: what the database says of them.
fn read(folders: &Folders, known: &ById, done: &mut Rebuilt) -> Result<ById, Error> {
    let mut found = BTreeMap::new();
    for id in folders.ids()? {
        let in_folder = match folders.read(id) {
            Ok(snapshot) if snapshot.id == id => Some(snapshot),
            Ok(_) => None,
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                warn!(id, error, "a snapshot folder has no readable record");
                None
            }
        };
        match (in_folder, known.get(&id)) {
            (Some(ours), Some(theirs)) if theirs.updated > ours.updated => {
                folders.record(theirs)?;
                done.rewritten += 1;
                found.insert(id, theirs.clone());
            }
            (Some(ours), _) => drop(found.insert(id, ours)),
            (None, Some(theirs)) => {
                folders.record(theirs)?;
                done.rewritten += 1;
                found.insert(id, theirs.clone());
            }
            (None, None) if !folders.has_record(id) => {
                folders.discard(id)?;
                done.discarded += 1;
            }
            (None, None) => {
                error!(id, "a snapshot folder makes no sense; it is left alone");
                done.left += 1;
            }
        }
    }
    Ok(found)
}

/// Of several with one name, the newer folder is the later truth.
fn supersede(
    folders: &Folders,
    found: &mut ById,
    done: &mut Rebuilt,
) -> Result<(), folders::Error> {
    let newest: BTreeMap<String, u64> = found.values().map(|s| (s.name.clone(), s.id)).collect();
    let is_newest = |s: &Snapshot| newest.get(&s.name) == Some(&s.id);
    let older: Vec<u64> = found.values().filter(|s| !is_newest(s)).map(|s| s.id).collect();
    for id in older {
        found.remove(&id);
        folders.discard(id)?;
        done.discarded += 1;
    }
    Ok(())
}

/// Parents that only the database knows stay: a layer needs nothing but its record.
fn keep_parents(
    folders: &Folders,
    known: &ById,
    found: &mut ById,
    done: &mut Rebuilt,
) -> Result<(), folders::Error> {
    let by_name: BTreeMap<&str, &Snapshot> = known.values().map(|s| (s.name.as_str(), s)).collect();
    let names: BTreeSet<String> = found.values().map(|s| s.name.clone()).collect();
    let mut wanted: Vec<String> = found.values().map(|s| s.parent.clone()).collect();
    while let Some(name) = wanted.pop() {
        let Some(parent) = by_name.get(name.as_str()).filter(|_| !names.contains(&name)) else {
            continue;
        };
        if found.contains_key(&parent.id) {
            continue;
        }
        if parent.layer.is_some() {
            folders.create(parent, Content::Owned(None))?;
            done.rewritten += 1;
        } else {
            error!(id = parent.id, name, "the folder of a snapshot with children is missing");
        }
        wanted.push(parent.parent.clone());
        found.insert(parent.id, (*parent).clone());
    }
    Ok(())
}

/// The ids of snapshots whose chain of parents is complete and committed.
fn usable(found: &ById) -> BTreeSet<u64> {
    let mut children: BTreeMap<&str, Vec<&Snapshot>> = BTreeMap::new();
    for snapshot in found.values() {
        children.entry(&snapshot.parent).or_default().push(snapshot);
    }
    let mut seen = BTreeSet::new();
    let mut next: Vec<&str> = vec![""];
    while let Some(parent) = next.pop() {
        for child in children.get(parent).into_iter().flatten() {
            let fresh = !child.name.is_empty() && seen.insert(child.id);
            if fresh && child.kind == Kind::Committed {
                next.push(&child.name);
            }
        }
    }
    seen
}
