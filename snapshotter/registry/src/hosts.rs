//! Which endpoints serve a registry host: containerd's `certs.d/<host>/hosts.toml`.
//!
//! The format and its defaults are containerd's (docs/hosts.md of containerd, version 2): each
//! `[host."…"]` in the order of the file, then `server`. Files are read anew when they are older
//! than [`FRESH`], so that no restart is needed.

mod file;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::HeaderMap;

use crate::tls::Material;

const FRESH: Duration = Duration::from_secs(5);
const CACHED_HOSTS: usize = 256;
/// Nobody's hosts.toml or certificate bundle is larger.
const FILE_BYTES: u64 = 4 << 20;

/// One server that may be asked for a registry's content.
#[derive(Clone)]
pub struct Endpoint {
    /// With the API's path and no slash at the end: `https://registry-1.docker.io/v2`.
    pub base: Url,
    pub can_pull: bool,
    pub can_resolve: bool,
    pub tls: Arc<Material>,
    /// Sent to this endpoint only, never along a redirect.
    pub headers: HeaderMap,
    /// The registry that an endpoint of another name is asked on behalf of (`?ns=`).
    pub namespace: Option<String>,
    /// Whether this stands in for the registry itself, whose answers are final.
    pub is_mirror: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not a registry host: expected a name or an address, with an optional port")]
    Host(String),
    #[error("read {path}")]
    Read { path: String, source: io::Error },
    #[error("{path} has more than {FILE_BYTES} bytes; is it the right file?")]
    TooLarge { path: String },
    #[error("{path}, line {line}: not TOML: {message}; correct that line")]
    Syntax { path: String, line: usize, message: String },
    #[error("{path}: key {key}: {problem}; {remedy}")]
    Key { path: String, key: String, problem: String, remedy: &'static str },
}

type Cached = HashMap<String, (Instant, Arc<[Endpoint]>)>;

/// The endpoints of every registry host, from the files below containerd's `config_path`.
pub struct Hosts {
    roots: Vec<PathBuf>,
    cached: Mutex<Cached>,
}

impl Hosts {
    /// `config_path` is containerd's: one folder, or several separated by colons.
    pub fn new(config_path: Option<&Path>) -> Self {
        let roots = config_path.map(|path| std::env::split_paths(path).collect());
        Self { roots: roots.unwrap_or_default(), cached: Mutex::default() }
    }

    /// The endpoints of `host` in the order in which they are to be asked.
    pub async fn endpoints(&self, host: &str) -> Result<Arc<[Endpoint]>, Error> {
        let cached = self.lock().get(host).cloned();
        if let Some((read, endpoints)) = cached.filter(|(read, _)| read.elapsed() < FRESH) {
            tracing::trace!(host, age_ms = read.elapsed().as_millis(), "endpoints are known");
            return Ok(endpoints);
        }
        let (roots, name) = (self.roots.clone(), host.to_owned());
        let loaded = tokio::task::spawn_blocking(move || load(&roots, &name)).await;
        let endpoints: Arc<[Endpoint]> = loaded
            .map_err(|e| Error::Read { path: host.to_owned(), source: io::Error::other(e) })??
            .into();
        let mut cached = self.lock();
        if cached.len() >= CACHED_HOSTS {
            cached.clear();
        }
        cached.insert(host.to_owned(), (Instant::now(), Arc::clone(&endpoints)));
        Ok(endpoints)
    }

    fn lock(&self) -> MutexGuard<'_, Cached> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the endpoints of `host` from the first of its folders that exists.
fn load(roots: &[PathBuf], host: &str) -> Result<Vec<Endpoint>, Error> {
    if !is_host(host) {
        return Err(Error::Host(host.chars().take(100).collect()));
    }
    let folder = folders(roots, host).into_iter().find(|folder| folder.is_dir());
    let folder = folder.unwrap_or_default();
    let path = folder.join("hosts.toml");
    let written = match read(&path) {
        _ if folder.as_os_str().is_empty() => None,
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
        read => Some(read?),
    };
    let text = String::from_utf8_lossy(written.as_deref().unwrap_or_default());
    let mut endpoints: Vec<Endpoint> = file::parse(&text, &path, host)?
        .into_iter()
        .map(|parsed| parsed.open(&folder))
        .collect::<Result<_, _>>()?;
    if written.is_none() && !folder.as_os_str().is_empty() {
        let material = docker_files(&folder)?;
        for endpoint in endpoints.iter_mut().filter(|_| material != Material::default()) {
            endpoint.tls = Arc::new(material.clone());
            // Certificates for an address on this machine: it doesn't speak plain http.
            let _ = endpoint.base.set_scheme("https");
        }
    }
    Ok(endpoints)
}

/// Where a host's folder may be: `host_port_`, `host:port`, `_default`; in each root in turn.
fn folders(roots: &[PathBuf], host: &str) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for root in roots {
        if let Some((name, port)) = host.rsplit_once(':') {
            folders.push(root.join(format!("{name}_{port}_")));
        }
        folders.push(root.join(host));
        folders.push(root.join("_default"));
    }
    folders
}

/// Docker's convention for a folder without hosts.toml: `*.crt` are authorities, `X.cert` with
/// `X.key` is a client certificate.
fn docker_files(folder: &Path) -> Result<Material, Error> {
    let failed = |source| Error::Read { path: folder.display().to_string(), source };
    let mut names: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.path());
    }
    names.sort();
    let mut material = Material::default();
    for name in names {
        match name.extension().and_then(|e| e.to_str()) {
            Some("crt") => material.authorities.push(read(&name)?),
            Some("cert") => {
                let key = name.with_extension("key");
                material.clients.push((read(&name)?, read(&key)?));
            }
            _ => {}
        }
    }
    Ok(material)
}

/// Reads a file of bounded size.
fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { path: path.display().to_string(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES {
        return Err(Error::TooLarge { path: path.display().to_string() });
    }
    std::fs::read(path).map_err(failed)
}

/// The name becomes part of a path and of a URL, and may come from a label: letters, digits, dots,
/// dashes, a port, brackets for IPv6.
fn is_host(host: &str) -> bool {
    host.len() <= 260
        && host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
        && host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_:[]".contains(&b))
        && !host.contains("..")
}
