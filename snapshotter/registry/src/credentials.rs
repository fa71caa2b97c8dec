//! Who we are to a registry.
//!
//! Asked in this order: docker's `config.json` with its credential helpers, kubelet's credential-provider plugins, what
//! this node was told by way of CRI. All that they know is tried, until the registry takes one.
//!
//! Owns: what each of them said, in memory only.

mod docker;
mod file;
mod helper;
mod plugins;
mod program;
#[cfg(test)]
mod tests;
mod told;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use self::docker::Docker;
pub use self::file::Written;
pub use self::helper::Error as HelperError;
pub use self::plugins::Error as PluginError;
use self::plugins::Plugins;
pub use self::told::Told;

const FILE_BYTES: u64 = 4 << 20;

/// How people name Docker's registry; it answers to other names.
const HUB: &str = "docker.io";

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
    #[error(transparent)]
    Plugin(#[from] PluginError),
}

/// Which state of a file an answer comes from: it changes when the file does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileVersion(Option<(SystemTime, u64)>);

impl FileVersion {
    fn of(path: Option<&Path>) -> Self {
        let metadata = path.and_then(|path| std::fs::metadata(path).ok());
        Self(metadata.and_then(|m| Some((m.modified().ok()?, m.len()))))
    }

    fn len(self) -> u64 {
        self.0.map_or(0, |(_, len)| len)
    }
}

/// Which state of everything that holds credentials an answer comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version {
    docker: FileVersion,
    plugins: FileVersion,
    told: told::Version,
}

/// Where credentials are looked for.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// docker's config.json; a file that doesn't exist holds no credentials.
    pub docker_config: Option<PathBuf>,
    /// kubelet's CredentialProviderConfig, and the folder of the programs that it names.
    pub plugins: Option<(PathBuf, PathBuf)>,
    /// What this node is told when it is asked to pull.
    pub told: Told,
}

pub struct Credentials {
    docker: Docker,
    plugins: Option<Plugins>,
    told: Told,
}

impl Credentials {
    pub fn new(places: Places) -> Self {
        let plugins = places.plugins.map(|(config, programs)| Plugins::new(config, programs));
        Self { docker: Docker::new(places.docker_config), plugins, told: places.told }
    }

    /// Of what is known for `repository` at `host`.
    pub fn version(&self, host: &str, repository: &str) -> Version {
        Version {
            docker: self.docker.version(),
            plugins: self.plugins.as_ref().map(Plugins::version).unwrap_or_default(),
            told: self.told.version(host, repository),
        }
    }

    /// The credentials for `repository` at `host`, the likeliest first. `again` asks helpers and plugins anew, since
    /// the registry refused what they said before.
    pub async fn find(
        &self,
        host: &str,
        repository: &str,
        again: bool,
    ) -> Result<Vec<Credential>, Error> {
        let host = plain(host);
        let (mut found, mut failed) = (Vec::new(), None);
        match self.docker.find(host, repository, again).await {
            Ok(credential) => found.extend(credential),
            Err(error) => failed = Some(error),
        }
        if let Some(plugins) = &self.plugins {
            match plugins.find(host, repository, again).await {
                Ok(credentials) => found.extend(credentials),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        found.extend(self.told.find(host, repository));
        match failed {
            Some(error) if found.is_empty() => Err(error),
            Some(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(host, error, "credentials left out");
                Ok(found)
            }
            None => Ok(found),
        }
    }
}

/// The host of a server's address, which may be a URL.
pub fn server_host(address: &str) -> String {
    file::place(address).0
}

fn plain(host: &str) -> &str {
    if matches!(host, "index.docker.io" | "registry-1.docker.io") { HUB } else { host }
}
