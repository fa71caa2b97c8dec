//! [`Records`] in memory: what tests run on, and what the stored records must behave like.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};

use skimmer_proto::Digest;

use super::{Change, Error, Records};
use crate::{Snapshot, Usage};

#[derive(Default)]
pub struct Memory {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    snapshots: BTreeMap<String, Snapshot>,
    usages: BTreeMap<u64, Usage>,
    last_id: u64,
}

impl Memory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self, wanted: impl Fn(&Snapshot) -> bool) -> Vec<String> {
        self.state().snapshots.values().filter(|s| wanted(s)).map(|s| s.name.clone()).collect()
    }
}

impl Records for Memory {
    fn get(&self, name: &str) -> Result<Option<Snapshot>, Error> {
        Ok(self.state().snapshots.get(name).cloned())
    }

    fn has_children(&self, parent: &str) -> Result<bool, Error> {
        Ok(!self.children(parent)?.is_empty())
    }

    fn children(&self, parent: &str) -> Result<Vec<String>, Error> {
        Ok(self.names(|s| s.parent == parent))
    }

    fn claiming(&self, reference: &str, parent: &str) -> Result<Vec<String>, Error> {
        Ok(self.names(|s| s.reference() == Some(reference) && s.parent == parent))
    }

    fn uses_layer(&self, blob: &Digest) -> Result<bool, Error> {
        let uses = |s: &Snapshot| s.layer.as_ref().is_some_and(|l| l.blob.digest == *blob);
        Ok(!self.names(uses).is_empty())
    }

    fn visit(&self, visit: &mut dyn FnMut(Snapshot) -> ControlFlow<()>) -> Result<(), Error> {
        let all: Vec<_> = self.state().snapshots.values().cloned().collect();
        for snapshot in all {
            if visit(snapshot).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn next_id(&self) -> Result<u64, Error> {
        Ok(self.state().last_id + 1)
    }

    fn apply(&self, change: &Change) -> Result<(), Error> {
        let mut state = self.state();
        match change {
            Change::Create(new) => {
                state.last_id = state.last_id.max(new.id);
                state.snapshots.insert(new.name.clone(), new.clone());
            }
            Change::Replace { old, new } => {
                state.snapshots.remove(&old.name);
                state.snapshots.insert(new.name.clone(), new.clone());
            }
            Change::Remove(old) => {
                state.snapshots.remove(&old.name);
                state.usages.remove(&old.id);
            }
        }
        Ok(())
    }

    fn is_sound(&self) -> Result<bool, Error> {
        Ok(true)
    }

    fn replace_all(&self, snapshots: &[Snapshot], last_id: u64) -> Result<(), Error> {
        let by_name = snapshots.iter().map(|s| (s.name.clone(), s.clone())).collect();
        *self.state() = State { snapshots: by_name, usages: BTreeMap::new(), last_id };
        Ok(())
    }

    fn usage(&self, id: u64) -> Result<Option<Usage>, Error> {
        Ok(self.state().usages.get(&id).copied())
    }

    fn remember_usage(&self, id: u64, usage: Usage) -> Result<(), Error> {
        self.state().usages.insert(id, usage);
        Ok(())
    }
}
