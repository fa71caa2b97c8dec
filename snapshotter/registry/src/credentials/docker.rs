//! docker's `config.json` and its credential helpers.
//!
//! Owns: the parsed file, read anew when it changes, and the credentials that helpers gave, for [`HELPER_FRESH`].
//! Asked in this order: the host's own helper, the general store, the file itself.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::file::{self, File};
use super::{Credential, Error, FILE_BYTES, FileVersion, HUB, helper};

/// Cloud registries' helpers hand out tokens that live for an hour or more.
const HELPER_FRESH: Duration = Duration::from_secs(300);
const HELPER_ANSWERS: usize = 256;

/// How docker names docker.io in config.json and to helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The credential that a helper gave for a server, and when.
type Helped = HashMap<(String, String), (Instant, Credential)>;

pub struct Docker {
    path: Option<PathBuf>,
    /// Where helpers are looked for, as in PATH.
    pub(super) programs: OsString,
    read: Mutex<Option<(FileVersion, Arc<File>)>>,
    helped: Mutex<Helped>,
}

impl Docker {
    /// `path` is that of config.json; a file that doesn't exist holds no credentials.
    pub fn new(path: Option<PathBuf>) -> Self {
        let programs = std::env::var_os("PATH").unwrap_or_default();
        Self { path, programs, read: Mutex::default(), helped: Mutex::default() }
    }

    pub fn version(&self) -> FileVersion {
        FileVersion::of(self.path.as_deref())
    }

    /// The credential for `repository` at `host`, if there is one. `again` asks helpers anew, since
    /// the registry refused what they said before.
    pub async fn find(
        &self,
        host: &str,
        repository: &str,
        again: bool,
    ) -> Result<Option<Credential>, Error> {
        let file = self.file()?;
        let server = if host == HUB { DOCKER_HUB } else { host };
        if let Some(name) = file.helper(host) {
            let (key, now) = ((name.to_owned(), server.to_owned()), Instant::now());
            let known = self.helped().get(&key).cloned();
            let fresh = |at: &Instant| now.duration_since(*at) < HELPER_FRESH && !again;
            let credential = match known.filter(|(at, _)| fresh(at)) {
                Some((_, credential)) => Some(credential),
                None => {
                    let credential = helper::get(name, server, &self.programs).await?;
                    self.note(key, now, credential.clone());
                    credential
                }
            };
            if credential.is_some() {
                return Ok(credential);
            }
        }
        Ok(file.find(host, repository).cloned())
    }

    fn file(&self) -> Result<Arc<File>, Error> {
        let Some(path) = &self.path else { return Ok(Arc::default()) };
        let version = self.version();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, file)) = read.as_ref().filter(|(at, _)| *at == version) {
            tracing::trace!(?at, "config.json has not changed");
            return Ok(Arc::clone(file));
        }
        let shown = path.display().to_string();
        if version.len() > FILE_BYTES {
            return Err(Error::TooLarge { path: shown });
        }
        let bytes = match std::fs::read(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => b"{}".to_vec(),
            read => read.map_err(|source| Error::Read { path: shown.clone(), source })?,
        };
        let file = Arc::new(file::parse(&bytes, &shown)?);
        *read = Some((version, Arc::clone(&file)));
        self.helped().clear();
        Ok(file)
    }

    /// Remembers what a helper gave. One that gave nothing is asked at the next use: no registry will refuse nothing.
    fn note(&self, key: (String, String), at: Instant, given: Option<Credential>) {
        let mut helped = self.helped();
        if helped.len() >= HELPER_ANSWERS {
            helped.clear();
        }
        match given {
            Some(credential) => helped.insert(key, (at, credential)),
            None => helped.remove(&key),
        };
    }

    fn helped(&self) -> MutexGuard<'_, Helped> {
        self.helped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
