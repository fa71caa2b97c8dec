//! Tasks: the distribution of one blob to those who may read it.
//!
//! A task is a blob in a *scope* of rights: a repository, or the public. A node that got a blob
//! through one private repository never serves it to readers of another, so these are two tasks.

use std::fmt;

use sha2::{Digest as _, Sha256};

use crate::Digest;

/// Names a task; derived by both ends from the blob's digest and the scope:
/// SHA-256 of `skimmer-task-v1`, a zero byte, the scope's name, a zero byte, the 32 digest bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId([u8; 32]);

/// Who may read a task's bytes from other nodes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scope {
    /// Every node of the cluster: the origin serves it to anybody.
    Public,
    /// Nodes with a grant for this `host/repository`.
    Repository(String),
}

impl Scope {
    /// The wire form: empty for the public, else `host/repository`.
    pub fn name(&self) -> &str {
        match self {
            Self::Public => "",
            Self::Repository(name) => name,
        }
    }

    pub fn from_name(name: &str) -> Self {
        if name.is_empty() { Self::Public } else { Self::Repository(name.to_owned()) }
    }
}

impl TaskId {
    pub fn of(scope: &Scope, blob: &Digest) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"skimmer-task-v1\0");
        hash.update(scope.name());
        hash.update(b"\0");
        hash.update(blob.as_bytes());
        Self(hash.finalize().into())
    }

    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// `None` if it isn't 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for TaskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TaskId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_a_blob_in_a_scope() {
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let repository = Scope::Repository("docker.io/library/debian".to_owned());
        let ids = [
            TaskId::of(&Scope::Public, &a),
            TaskId::of(&Scope::Public, &b),
            TaskId::of(&repository, &a),
        ];
        assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
        assert_eq!(Scope::from_name(repository.name()), repository);
        assert_eq!(Scope::from_name(Scope::Public.name()), Scope::Public);
        // The id is part of the protocol: a change of it splits the swarm.
        assert_eq!(
            TaskId::of(&repository, &a).to_string(),
            "222009341454ffd9c61525c94ea5f6273fce7fc1d46511c1b6b08fa1eb69c01e"
        );
    }
}
