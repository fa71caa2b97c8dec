//! The rules of snapshots: who may be whose parent, what may be committed or removed. Pure.
//!
//! Each function looks at the records and answers with the one change to make, or why not. The
//! refusals are those of containerd's own overlayfs snapshotter.

#[cfg(test)]
mod tests;

use std::time::SystemTime;

use crate::records::{self, Change, Records};
use crate::{Binding, Kind, Labels, Snapshot};

/// Longest chain that is followed. Overlayfs itself stops at 500 layers.
const MAX_CHAIN: usize = 1024;

/// Why a request about snapshots is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a snapshot needs a name")]
    NoName,
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    #[error("snapshot parent {0:?} does not exist")]
    NoParent(String),
    #[error("snapshot {0:?} already exists")]
    Exists(String),
    #[error("snapshot parent {0:?} is not committed")]
    ParentNotCommitted(String),
    #[error("cannot commit on snapshot parent {0:?}, which is not committed")]
    RebaseOnUncommitted(String),
    #[error("snapshot {0:?} is not active, so it cannot be committed")]
    NotActive(String),
    #[error("snapshot {0:?} is committed: only views and active snapshots have mounts")]
    Committed(String),
    #[error(
        "snapshot {key:?} has the snapshot parent {old:?}; a commit cannot change it to {new:?}"
    )]
    OtherParent { key: String, old: String, new: String },
    #[error("cannot remove snapshot {0:?}: it has children")]
    HasChildren(String),
    #[error("cannot update field {field:?} of snapshot {name:?}: only labels can be changed")]
    Immutable { name: String, field: String },
    #[error(
        "the chain of snapshot parents of {0:?} is longer than {MAX_CHAIN} or goes in a circle"
    )]
    TooLong(String),
    #[error(transparent)]
    Records(#[from] records::Error),
}

/// What a new snapshot shall be.
#[derive(Clone, Debug)]
pub struct New {
    pub name: String,
    pub parent: String,
    pub kind: Kind,
    pub labels: Labels,
    pub layer: Option<Binding>,
}

/// The record of a new snapshot. Its id is the next free one.
pub fn create(records: &dyn Records, now: SystemTime, new: New) -> Result<Snapshot, Error> {
    let New { name, parent, kind, labels, layer } = new;
    if !parent.is_empty() {
        match records.get(&parent)? {
            None => return Err(Error::NoParent(parent)),
            Some(found) if found.kind != Kind::Committed => {
                return Err(Error::ParentNotCommitted(parent));
            }
            Some(_) => {}
        }
    }
    require_free(records, &name)?;
    let id = records.next_id()?;
    let labels = without_empty(labels);
    Ok(Snapshot {
        id,
        name,
        parent,
        kind,
        created: now,
        updated: now,
        labels,
        layer,
        lost: Vec::new(),
    })
}

/// The active snapshot `key` as the committed snapshot `name`. Labels are replaced, not inherited;
/// `parent`, unless empty, is given to a snapshot that has none yet.
pub fn commit(
    records: &dyn Records,
    now: SystemTime,
    name: &str,
    key: &str,
    labels: Labels,
    parent: &str,
) -> Result<Change, Error> {
    require_free(records, name)?;
    let old = get(records, key)?;
    if old.kind != Kind::Active {
        return Err(Error::NotActive(key.to_owned()));
    }
    let mut new = Snapshot {
        name: name.to_owned(),
        kind: Kind::Committed,
        created: now,
        updated: now,
        labels: without_empty(labels),
        ..old.clone()
    };
    if !parent.is_empty() && parent != old.parent {
        if !old.parent.is_empty() {
            let (key, old, new) = (key.to_owned(), old.parent, parent.to_owned());
            return Err(Error::OtherParent { key, old, new });
        }
        parent.clone_into(&mut new.parent);
    }
    if !new.parent.is_empty() {
        match records.get(&new.parent)? {
            None => return Err(Error::NoParent(new.parent)),
            Some(found) if found.kind != Kind::Committed => {
                return Err(Error::RebaseOnUncommitted(new.parent));
            }
            Some(_) => {}
        }
    }
    Ok(Change::Replace { old, new })
}

/// New labels for snapshot `name`: all of them if `fields` is empty or names `labels`, else those
/// named by `labels.<key>`. A label without a value is deleted.
pub fn update(
    records: &dyn Records,
    now: SystemTime,
    name: &str,
    labels: &Labels,
    fields: &[String],
) -> Result<Change, Error> {
    let old = get(records, name)?;
    let mut new = Snapshot { updated: now, ..old.clone() };
    if fields.is_empty() {
        new.labels.clone_from(labels);
    }
    for field in fields {
        if let Some(key) = field.strip_prefix("labels.") {
            let value = labels.get(key).cloned().unwrap_or_default();
            new.labels.insert(key.to_owned(), value);
        } else if field == "labels" {
            new.labels.clone_from(labels);
        } else {
            let (name, field) = (name.to_owned(), field.clone());
            return Err(Error::Immutable { name, field });
        }
    }
    new.labels = without_empty(new.labels);
    Ok(Change::Replace { old, new })
}

/// The removal of snapshot `name`, which nobody builds on.
pub fn remove(records: &dyn Records, name: &str) -> Result<Change, Error> {
    let old = get(records, name)?;
    if records.has_children(name)? {
        return Err(Error::HasChildren(name.to_owned()));
    }
    Ok(Change::Remove(old))
}

/// The view or active snapshot `key` and its snapshot parents, nearest first.
pub fn mountable(records: &dyn Records, key: &str) -> Result<(Snapshot, Vec<Snapshot>), Error> {
    let snapshot = get(records, key)?;
    if snapshot.kind == Kind::Committed {
        return Err(Error::Committed(key.to_owned()));
    }
    let parents = parents(records, &snapshot.parent)?;
    Ok((snapshot, parents))
}

/// Snapshot `name` and all above it, nearest first; nothing for the empty name.
pub fn parents(records: &dyn Records, name: &str) -> Result<Vec<Snapshot>, Error> {
    let mut chain: Vec<Snapshot> = Vec::new();
    let mut next = name.to_owned();
    while !next.is_empty() {
        if chain.len() == MAX_CHAIN {
            return Err(Error::TooLong(name.to_owned()));
        }
        let Some(snapshot) = records.get(&next)? else {
            return Err(Error::NoParent(next));
        };
        next.clone_from(&snapshot.parent);
        chain.push(snapshot);
    }
    Ok(chain)
}

pub fn get(records: &dyn Records, name: &str) -> Result<Snapshot, Error> {
    records.get(name)?.ok_or_else(|| Error::NotFound(name.to_owned()))
}

fn require_free(records: &dyn Records, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::NoName);
    }
    match records.get(name)? {
        None => Ok(()),
        Some(_) => Err(Error::Exists(name.to_owned())),
    }
}

/// containerd's stores drop labels without a value.
fn without_empty(mut labels: Labels) -> Labels {
    labels.retain(|_, value| !value.is_empty());
    labels
}
