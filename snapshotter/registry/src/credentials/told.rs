//! Credentials that this node was told when it was asked to pull: kubelet's pull secrets, by way of CRI.
//!
//! Owns: what it was told, bounded by time and number, in memory only: its own, and that of a file that the daemon's
//! successor finds again.
//! Does not own: whether the registry takes it; who told it says so afterwards.

mod record;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use self::record::Record;
use super::{Credential, plain};

/// Repositories that are remembered; the one that was told longest ago makes room.
const REPOSITORIES: usize = 4096;
/// Credentials of one repository: secrets of several namespaces, or yesterday's and today's.
const EACH: usize = 4;
/// A longer one is none that a registry would take.
const SECRET_BYTES: usize = 64 << 10;

/// Clones share what they know.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    kept: Duration,
    known: Known,
    memory: Option<File>,
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
    told_at: SystemTime,
    number: u64,
}

/// Never says what it holds.
impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Told").field("kept", &self.state().kept).finish_non_exhaustive()
    }
}

impl Told {
    /// Each credential is kept for `kept` after it was last told. `memory`: a file without a disk, in which an earlier
    /// process may have left what it was told.
    pub fn open(kept: Duration, memory: Option<File>) -> Self {
        let known = memory.as_ref().map(Known::read).unwrap_or_default();
        Self(Arc::new(Mutex::new(State { kept, known, memory })))
    }

    /// Remembers `credential` for `repository` at `host`; whether it is new.
    pub fn remember(&self, host: &str, repository: &str, credential: &Credential) -> bool {
        let mut state = self.state();
        let (now, kept) = (SystemTime::now(), state.kept);
        let is_new = state.known.remember(key(host, repository), credential, now, kept);
        state.write();
        is_new
    }

    /// Forgets it: the registry didn't take it.
    pub fn forget(&self, host: &str, repository: &str, credential: &Credential) {
        let mut state = self.state();
        state.known.forget(&key(host, repository), credential);
        state.write();
    }

    /// What is known, the latest first.
    pub fn find(&self, host: &str, repository: &str) -> Vec<Credential> {
        let found = self.state().live(host, repository);
        found.into_iter().map(|(_, credential)| credential).collect()
    }

    /// It changes whenever what [`find`](Self::find) returns has others in it.
    pub fn version(&self, host: &str, repository: &str) -> Version {
        let found = self.state().live(host, repository);
        Version { latest: found.iter().map(|(number, _)| *number).max(), count: found.len() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn live(&self, host: &str, repository: &str) -> Vec<(u64, Credential)> {
        self.known.live(&key(host, repository), SystemTime::now(), self.kept)
    }

    fn write(&self) {
        let Some(memory) = &self.memory else { return };
        if let Err(error) = record::write(memory, &self.known.records()) {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "credentials of pulls won't outlive this process");
        }
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
        now: SystemTime,
        kept: Duration,
    ) -> bool {
        self.sweep(now, kept);
        if kept.is_zero() || len(credential) > SECRET_BYTES {
            return false;
        }
        if !self.by_repository.contains_key(&key) {
            self.make_room();
        }
        let entries = self.by_repository.entry(key).or_default();
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

    fn forget(&mut self, key: &(String, String), credential: &Credential) {
        let Some(entries) = self.by_repository.get_mut(key) else { return };
        entries.retain(|entry| entry.credential != *credential);
        if entries.is_empty() {
            self.by_repository.remove(key);
        }
    }

    /// What has ended goes with the next that is told.
    fn sweep(&mut self, now: SystemTime, kept: Duration) {
        self.by_repository.retain(|_, entries| {
            entries.retain(|entry| entry.is_live(now, kept));
            !entries.is_empty()
        });
    }

    fn make_room(&mut self) {
        if self.by_repository.len() < REPOSITORIES {
            return;
        }
        let latest = |entries: &[Entry]| entries.first().map(|entry| entry.told_at);
        let oldest = self.by_repository.iter().min_by_key(|(_, entries)| latest(entries));
        if let Some(key) = oldest.map(|(key, _)| key.clone()) {
            self.by_repository.remove(&key);
        }
    }

    fn live(
        &self,
        key: &(String, String),
        now: SystemTime,
        kept: Duration,
    ) -> Vec<(u64, Credential)> {
        let entries = self.by_repository.get(key).into_iter().flatten();
        let live = entries.filter(|entry| entry.is_live(now, kept));
        live.map(|entry| (entry.number, entry.credential.clone())).collect()
    }
}

impl Known {
    /// What an earlier process has [recorded](Self::records); nothing if it left nothing that can be read.
    fn read(memory: &File) -> Self {
        let mut known = Self::default();
        for Record { host, repository, credential, told_at } in record::read(memory) {
            known.count += 1;
            let entry = Entry { credential, told_at, number: known.count };
            known.by_repository.entry((host, repository)).or_default().push(entry);
        }
        known
    }

    fn records(&self) -> Vec<Record> {
        let records = self.by_repository.iter().flat_map(|((host, repository), entries)| {
            entries.iter().map(|entry| Record {
                host: host.clone(),
                repository: repository.clone(),
                credential: entry.credential.clone(),
                told_at: entry.told_at,
            })
        });
        records.collect()
    }
}

impl Entry {
    /// A clock that was set back makes nothing older.
    fn is_live(&self, now: SystemTime, kept: Duration) -> bool {
        now.duration_since(self.told_at).unwrap_or_default() < kept
    }
}

fn len(credential: &Credential) -> usize {
    match credential {
        Credential::Password { username, secret } => username.len() + secret.len(),
        Credential::Identity(token) | Credential::Bearer(token) => token.len(),
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
        let told = Told::open(KEPT, None);
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
        let told = Told::open(KEPT, None);
        told.remember("docker.io", "library/x", &password("p"));
        assert_eq!(secrets(told.find("registry-1.docker.io", "library/x")), ["p"]);
    }

    #[test]
    fn what_is_known_is_bounded_and_ends() {
        let mut known = Known::default();
        let start = SystemTime::now();
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
        assert!(!known.remember(key(3), &password(&"x".repeat(SECRET_BYTES)), start, KEPT));
        let late = start + KEPT * 2;
        known.remember(key(0), &password("p"), late, KEPT);
        assert_eq!(known.by_repository.len(), 1);
    }

    #[test]
    fn the_next_process_knows_what_this_one_was_told() {
        let memory = || tempfile::tempfile().unwrap();
        let file = memory();
        let told = Told::open(KEPT, Some(file.try_clone().unwrap()));
        let others = [
            Credential::Identity("id".to_owned()),
            Credential::Bearer("t".to_owned()),
            password("gone"),
        ];
        for credential in &others {
            told.remember("a.io", "x", credential);
        }
        told.forget("a.io", "x", &others[2]);
        told.remember("b.io", "y", &password("p"));
        let next = Told::open(KEPT, Some(file.try_clone().unwrap()));
        assert!(next.find("a.io", "x") == [others[1].clone(), others[0].clone()]);
        assert_eq!(secrets(next.find("b.io", "y")), ["p"]);
        assert!(!next.remember("b.io", "y", &password("p")));
        // Cut off in the middle, by a kill or by whatever.
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        assert!(Told::open(KEPT, Some(file)).find("b.io", "y").is_empty());
        assert!(Told::open(KEPT, Some(memory())).find("b.io", "y").is_empty());
    }

    #[test]
    fn nothing_is_remembered_for_no_time_and_nothing_is_shown() {
        let told = Told::default();
        assert!(!told.remember("a.io", "x", &password("s3cret")));
        assert!(told.find("a.io", "x").is_empty());
        let told = Told::open(KEPT, None);
        told.remember("a.io", "x", &password("s3cret"));
        assert!(!format!("{told:?}").contains("s3cret"));
    }
}
