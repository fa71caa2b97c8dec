//! Who we are to a registry: docker's `config.json` and its credential helpers.
//!
//! Owns: the parsed file, read anew when it changes, and what helpers said, for [`HELPER_FRESH`].
//! Asked in this order: the host's own helper, the general store, the file itself.

mod file;
mod helper;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use self::file::File;
pub use self::helper::Error as HelperError;

/// Cloud registries' helpers hand out tokens that live for an hour or more.
const HELPER_FRESH: Duration = Duration::from_secs(300);
const HELPER_ANSWERS: usize = 256;
const FILE_BYTES: u64 = 4 << 20;

/// How docker names docker.io in config.json and to helpers.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    Password {
        username: String,
        secret: String,
    },
    /// An OAuth2 refresh token, good for the registry's token endpoint only.
    Identity(String),
    /// A token that is sent to the registry as it is.
    Bearer(String),
}

/// Says which kind it is, never what it holds.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password",
            Self::Identity(_) => "Identity",
            Self::Bearer(_) => "Bearer",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read {path}")]
    Read { path: String, source: io::Error },
    #[error("{path} has more than {FILE_BYTES} bytes; is it docker's config.json?")]
    TooLarge { path: String },
    #[error(
        "{path}, line {line}: not docker's config.json ({category:?} error); correct that line"
    )]
    Syntax { path: String, line: usize, category: serde_json::error::Category },
    #[error(
        "{path}: key auths.{host:?}.auth is not the base64 of user:password; run docker login again"
    )]
    Auth { path: String, host: String },
    #[error(transparent)]
    Helper(#[from] HelperError),
}

/// Which state of the file an answer comes from: it changes when the file does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version(Option<(SystemTime, u64)>);

/// What a helper said about a server, and when.
type Helped = HashMap<(String, String), (Instant, Option<Credential>)>;

pub struct Credentials {
    path: Option<PathBuf>,
    /// Where helpers are looked for, as in PATH.
    programs: OsString,
    read: Mutex<Option<(Version, Arc<File>)>>,
    helped: Mutex<Helped>,
}

impl Credentials {
    /// `path` is that of config.json; a file that doesn't exist holds no credentials.
    pub fn new(path: Option<PathBuf>) -> Self {
        let programs = std::env::var_os("PATH").unwrap_or_default();
        Self { path, programs, read: Mutex::default(), helped: Mutex::default() }
    }

    pub fn version(&self) -> Version {
        let metadata = self.path.as_ref().and_then(|path| std::fs::metadata(path).ok());
        Version(metadata.and_then(|m| Some((m.modified().ok()?, m.len()))))
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
        let hub = matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
        let (host, server) = if hub { ("docker.io", DOCKER_HUB) } else { (host, host) };
        if let Some(name) = file.helper(host) {
            let (key, now) = ((name.to_owned(), server.to_owned()), Instant::now());
            let known = self.helped().get(&key).cloned();
            let fresh = |at: &Instant| now.duration_since(*at) < HELPER_FRESH && !again;
            let credential = match known.filter(|(at, _)| fresh(at)) {
                Some((_, credential)) => credential,
                None => {
                    let credential = helper::get(name, server, &self.programs).await?;
                    let mut helped = self.helped();
                    if helped.len() >= HELPER_ANSWERS {
                        helped.clear();
                    }
                    helped.insert(key, (now, credential.clone()));
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
        if version.0.is_some_and(|(_, len)| len > FILE_BYTES) {
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

    fn helped(&self) -> MutexGuard<'_, Helped> {
        self.helped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
