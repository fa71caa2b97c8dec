//! Credentials that this node was told when it was asked to pull: kubelet's pull secrets, by way of CRI.
//!
//! Owns: what it was told, in memory only, bounded by time and number.
//! Does not own: whether the registry takes it; who told it says so afterwards.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Credential, plain};

/// Repositories that are remembered; the one that was told longest ago makes room.
const REPOSITORIES: usize = 4096;
/// Credentials of one repository: secrets of several namespaces, or yesterday's and today's.
const EACH: usize = 4;

/// Clones share what they know.
#[derive(Clone, Default)]
pub struct Told(Arc<Shared>);

#[derive(Default)]
struct Shared {
    kept: Duration,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// By host and repository, the latest first.
    by_repository: BTreeMap<(String, String), Vec<Entry>>,
    /// Credentials that were new when they were told.
    count: u64,
}

struct Entry {
    credential: Credential,
    told_at: Instant,
    number: u64,
}

/// Never says what it holds.
impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Told").field("kept", &self.0.kept).finish_non_exhaustive()
    }
}

impl Told {
    /// Each credential is kept for `kept` after it was last told.
    pub fn kept_for(kept: Duration) -> Self {
        Self(Arc::new(Shared { kept, known: Mutex::default() }))
    }

    /// Remembers `credential` for `repository` at `host`; whether it is new.
    pub fn remember(&self, host: &str, repository: &str, credential: &Credential) -> bool {
        self.known().remember(key(host, repository), credential, Instant::now(), self.0.kept)
    }

    /// Forgets it: the registry didn't take it.
    pub fn forget(&self, host: &str, repository: &str, credential: &Credential) {
        let mut known = self.known();
        let key = key(host, repository);
        if let Some(entries) = known.by_repository.get_mut(&key) {
            entries.retain(|entry| entry.credential != *credential);
            if entries.is_empty() {
                known.by_repository.remove(&key);
            }
        }
    }

    /// What is known, the latest first.
    pub fn find(&self, host: &str, repository: &str) -> Vec<Credential> {
        let found = self.known().live(&key(host, repository), Instant::now(), self.0.kept);
        found.into_iter().map(|(_, credential)| credential).collect()
    }

    /// It changes whenever what [`find`](Self::find) returns has others in it.
    pub fn version(&self, host: &str, repository: &str) -> Version {
        let found = self.known().live(&key(host, repository), Instant::now(), self.0.kept);
        Version { latest: found.iter().map(|(number, _)| *number).max(), count: found.len() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which credentials there are: what is added has a higher number than all before, what goes makes them fewer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    latest: Option<u64>,
    count: usize,
}

impl Known {
    fn remember(
        &mut self,
        key: (String, String),
        credential: &Credential,
        now: Instant,
        kept: Duration,
    ) -> bool {
        if kept.is_zero() {
            return false;
        }
        if !self.by_repository.contains_key(&key) {
            self.make_room(now, kept);
        }
        let entries = self.by_repository.entry(key).or_default();
        entries.retain(|entry| now.duration_since(entry.told_at) < kept);
        let known = entries.iter().position(|entry| entry.credential == *credential);
        let number = match known.map(|at| entries.remove(at)) {
            Some(entry) => entry.number,
            None => {
                self.count += 1;
                self.count
            }
        };
        entries.truncate(EACH - 1);
        entries.insert(0, Entry { credential: credential.clone(), told_at: now, number });
        known.is_none()
    }

    fn make_room(&mut self, now: Instant, kept: Duration) {
        if self.by_repository.len() < REPOSITORIES {
            return;
        }
        let latest = |entries: &[Entry]| entries.first().map(|entry| entry.told_at);
        self.by_repository.retain(|_, entries| {
            latest(entries).is_some_and(|told_at| now.duration_since(told_at) < kept)
        });
        let oldest = self.by_repository.iter().min_by_key(|(_, entries)| latest(entries));
        if self.by_repository.len() >= REPOSITORIES
            && let Some(key) = oldest.map(|(key, _)| key.clone())
        {
            self.by_repository.remove(&key);
        }
    }

    fn live(&self, key: &(String, String), now: Instant, kept: Duration) -> Vec<(u64, Credential)> {
        let entries = self.by_repository.get(key).into_iter().flatten();
        let live = entries.filter(|entry| now.duration_since(entry.told_at) < kept);
        live.map(|entry| (entry.number, entry.credential.clone())).collect()
    }
}

fn key(host: &str, repository: &str) -> (String, String) {
    (plain(host).to_owned(), repository.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: Duration = Duration::from_secs(100);

    fn password(secret: &str) -> Credential {
        Credential::Password { username: "u".to_owned(), secret: secret.to_owned() }
    }

    fn secrets(found: Vec<Credential>) -> Vec<String> {
        let secret = |credential| match credential {
            Credential::Password { secret, .. } => secret,
            other => panic!("{other:?}"),
        };
        found.into_iter().map(secret).collect()
    }

    #[test]
    fn the_latest_comes_first_and_only_for_its_repository() {
        let told = Told::kept_for(KEPT);
        let before = told.version("a.io", "x");
        assert!(told.remember("a.io", "x", &password("old")));
        assert!(told.remember("a.io", "x", &password("new")));
        let both = told.version("a.io", "x");
        assert!(!told.remember("a.io", "x", &password("old")));
        assert_eq!(secrets(told.find("a.io", "x")), ["old", "new"]);
        assert_eq!((told.version("a.io", "x"), both == before), (both, false));
        assert!(told.find("a.io", "y").is_empty() && told.find("b.io", "x").is_empty());
        assert_eq!(told.version("a.io", "y"), before);
        told.forget("a.io", "x", &password("old"));
        assert_eq!(secrets(told.find("a.io", "x")), ["new"]);
        assert!(told.version("a.io", "x") != both);
        told.forget("a.io", "x", &password("new"));
        assert_eq!(told.version("a.io", "x"), before);
    }

    #[test]
    fn docker_io_has_one_name() {
        let told = Told::kept_for(KEPT);
        told.remember("docker.io", "library/x", &password("p"));
        assert_eq!(secrets(told.find("registry-1.docker.io", "library/x")), ["p"]);
    }

    #[test]
    fn what_is_known_is_bounded_and_ends() {
        let mut known = Known::default();
        let start = Instant::now();
        let key = |n: usize| ("a.io".to_owned(), n.to_string());
        for n in 0..REPOSITORIES + 3 {
            let now = start + Duration::from_millis(n as u64);
            known.remember(key(n), &password("p"), now, KEPT);
        }
        assert_eq!(known.by_repository.len(), REPOSITORIES);
        assert!(known.live(&key(2), start, KEPT).is_empty());
        assert_eq!(known.live(&key(3), start, KEPT).len(), 1);
        for n in 0..10 {
            known.remember(key(3), &password(&n.to_string()), start, KEPT);
        }
        assert_eq!(known.live(&key(3), start, KEPT).len(), EACH);
        assert!(known.live(&key(3), start + KEPT, KEPT).is_empty());
        let late = start + KEPT * 2;
        known.remember(key(0), &password("p"), late, KEPT);
        assert_eq!(known.by_repository.len(), 1);
    }

    #[test]
    fn nothing_is_remembered_for_no_time_and_nothing_is_shown() {
        let told = Told::default();
        assert!(!told.remember("a.io", "x", &password("s3cret")));
        assert!(told.find("a.io", "x").is_empty());
        let told = Told::kept_for(KEPT);
        told.remember("a.io", "x", &password("s3cret"));
        assert!(!format!("{told:?}").contains("s3cret"));
    }
}
