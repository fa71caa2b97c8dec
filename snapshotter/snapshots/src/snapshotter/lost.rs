//! Containers whose files ended with whoever kept their mounts: skimmerd and the holder of descriptors, both.
//!
//! Such a container reads errors until it is started anew; nothing can bring its mounts back. It is noted in its
//! snapshot's own record, so that an operator is told of it however often skimmerd starts.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use skimmer_proto::Digest;
use tracing::{error, warn};

use super::{Error, Inner, Snapshotter};
use crate::records::Change;
use crate::{Kind, Snapshot, chain};

impl Snapshotter {
    /// The snapshots of containers that have to be started anew, by the blobs of the layers that they lost.
    pub async fn lost(&self) -> Result<BTreeMap<Digest, Vec<String>>, Error> {
        self.blocking(|inner| {
            let mut lost: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
            inner.records.visit(&mut |snapshot| {
                for blob in snapshot.lost {
                    lost.entry(blob).or_default().push(snapshot.name.clone());
                }
                ControlFlow::Continue(())
            })?;
            Ok(lost)
        })
        .await
    }
}

impl Inner {
    /// Nobody kept the mounts of the layers of `blobs`: names the containers whose they were, and notes it. Where it can't
    /// be noted it is only logged.
    pub(super) fn note_lost(&self, blobs: &BTreeSet<Digest>) {
        if !blobs.is_empty()
            && let Err(error) = self.try_note_lost(blobs)
        {
            let error = &error as &dyn std::error::Error;
            warn!(error, "not all containers that lost their mounts are noted");
        }
    }

    fn try_note_lost(&self, blobs: &BTreeSet<Digest>) -> Result<(), Error> {
        let _lock = self.lock();
        let mut in_use = Vec::new();
        self.records.visit(&mut |snapshot| {
            if snapshot.kind != Kind::Committed {
                in_use.push(snapshot);
            }
            ControlFlow::Continue(())
        })?;
        for old in in_use {
            let parents = chain::parents(self.records.as_ref(), &old.parent)?;
            let below =
                parents.iter().filter_map(|parent| Some(parent.layer.as_ref()?.blob.digest));
            let lost: BTreeSet<Digest> =
                below.filter(|blob| blobs.contains(blob)).chain(old.lost.iter().copied()).collect();
            if lost.len() > old.lost.len() {
                error!(
                    container = old.name,
                    "nobody kept the mounts of its layers, it gets errors: start it anew"
                );
                let new = Snapshot { lost: lost.into_iter().collect(), ..old.clone() };
                self.replace(Change::Replace { old, new })?;
            }
        }
        Ok(())
    }

    /// The snapshot is mounted anew, on mounts that are served. It is of no account if the note of it stays.
    pub(super) fn forget_lost(&self, snapshot: &Snapshot) {
        if !snapshot.lost.is_empty()
            && let Err(error) = self.try_forget_lost(snapshot)
        {
            let (name, error) = (&snapshot.name, &error as &dyn std::error::Error);
            warn!(name, error, "a container that was started anew stays noted");
        }
    }

    fn try_forget_lost(&self, snapshot: &Snapshot) -> Result<(), Error> {
        let _lock = self.lock();
        let Some(old) = self.records.get(&snapshot.name)?.filter(|known| known.id == snapshot.id)
        else {
            return Ok(());
        };
        let new = Snapshot { lost: Vec::new(), ..old.clone() };
        self.replace(Change::Replace { old, new }).map(drop)
    }
}
