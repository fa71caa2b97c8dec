//! docker's config.json: text in, credentials out. Pure.
//!
//! The format is docker's (docker/cli, `cli/config/configfile`): `auths` by server, `credHelpers` by
//! host, `credsStore` for all hosts.

use std::collections::HashMap;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;

use super::{Credential, Error};

#[derive(Default)]
pub struct File {
    /// Host, path below it, credential; longest path first.
    entries: Vec<(String, String, Credential)>,
    helpers: HashMap<String, String>,
    store: Option<String>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: Option<HashMap<String, Written>>,
    #[serde(default, rename = "credHelpers")]
    helpers: Option<HashMap<String, String>>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

/// A credential as docker writes it, and kubelet sends it: in one of several ways.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Written {
    /// The base64 of `user:password`.
    pub auth: String,
    pub username: String,
    pub password: String,
    #[serde(rename = "identitytoken")]
    pub identity_token: String,
    #[serde(rename = "registrytoken")]
    pub registry_token: String,
}

impl File {
    /// The helper that answers for `host`.
    pub fn helper(&self, host: &str) -> Option<&str> {
        let own = self.helpers.get(host).map(String::as_str);
        own.or(self.store.as_deref()).filter(|name| !name.is_empty())
    }

    /// The credential of the entry that names `host`, and most of the path of `repository`.
    pub fn find(&self, host: &str, repository: &str) -> Option<&Credential> {
        let covers = |path: &str| match repository.strip_prefix(path) {
            Some(rest) => path.is_empty() || rest.is_empty() || rest.starts_with('/'),
            None => false,
        };
        let mut matching =
            self.entries.iter().filter(|(name, path, _)| name == host && covers(path));
        matching.next().map(|(_, _, credential)| credential)
    }
}

/// Parses the file at `path`.
pub fn parse(bytes: &[u8], path: &str) -> Result<File, Error> {
    // The error's own Display may quote a value.
    let config: Config = serde_json::from_slice(bytes).map_err(|e| Error::Syntax {
        path: path.to_owned(),
        line: e.line(),
        category: e.classify(),
    })?;
    let mut entries = Vec::new();
    for (key, entry) in config.auths.unwrap_or_default() {
        let (host, below) = place(&key);
        let refused = || Error::Auth { path: path.to_owned(), host: host.clone() };
        if let Some(credential) = entry.credential().ok_or_else(refused)? {
            entries.push((host, below, credential));
        }
    }
    entries
        .sort_by(|(host_a, a, _), (host_b, b, _)| (host_a, b.len(), a).cmp(&(host_b, a.len(), b)));
    let helpers = config.helpers.unwrap_or_default();
    let helpers = helpers.into_iter().map(|(key, name)| (place(&key).0, name)).collect();
    Ok(File { entries, helpers, store: config.store })
}

impl Written {
    /// The credential; `Some(None)` if there is none (docker writes such entries for hosts whose
    /// credentials are in a store), `None` if it can't be read.
    pub fn credential(self) -> Option<Option<Credential>> {
        if !self.identity_token.is_empty() {
            return Some(Some(Credential::Identity(self.identity_token)));
        }
        if !self.registry_token.is_empty() {
            return Some(Some(Credential::Bearer(self.registry_token)));
        }
        let (username, secret) = if self.auth.is_empty() {
            (self.username, self.password)
        } else {
            let auth = self.auth.trim();
            let decoded = STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth)).ok()?;
            let text = String::from_utf8(decoded).ok()?;
            let (username, secret) = text.split_once(':')?;
            (username.to_owned(), secret.trim_matches('\0').to_owned())
        };
        Some(match username.as_str() {
            "" => None,
            "<token>" => Some(Credential::Identity(secret)),
            _ => Some(Credential::Password { username, secret }),
        })
    }
}

/// Host and path of a key, which may be a URL: `https://index.docker.io/v1/` is docker.io.
pub fn place(key: &str) -> (String, String) {
    let bare = key.trim_start_matches("https://").trim_start_matches("http://");
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    let path = path.trim_matches('/');
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    let hub = matches!(host, "index.docker.io" | "registry-1.docker.io");
    (if hub { "docker.io" } else { host }.to_owned(), path.to_owned())
}
