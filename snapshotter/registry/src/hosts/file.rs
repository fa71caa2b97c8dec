//! One hosts.toml: text in, endpoints out. Pure but for [`Parsed::open`], which reads the
//! certificates that the file names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::{Table, Value};

use super::{Endpoint, Error, read};
use crate::origin::is_local;
use crate::tls::Material;

/// An endpoint whose certificates have not been read yet; paths are relative to the file's folder.
#[derive(Debug)]
pub struct Parsed {
    pub base: Url,
    pub can_pull: bool,
    pub can_resolve: bool,
    pub authorities: Vec<PathBuf>,
    /// Certificate and key; without the latter, one file holds both.
    pub clients: Vec<(PathBuf, Option<PathBuf>)>,
    pub skip_verify: bool,
    pub headers: HeaderMap,
    pub namespace: Option<String>,
    pub is_mirror: bool,
}

impl Parsed {
    /// Reads the certificates.
    pub fn open(self, folder: &Path) -> Result<Endpoint, Error> {
        let certificate = |path: &PathBuf| read(&folder.join(path));
        let authorities = self.authorities.iter().map(certificate).collect::<Result<_, _>>()?;
        let mut clients = Vec::new();
        for (chain, key) in &self.clients {
            clients.push((certificate(chain)?, certificate(key.as_ref().unwrap_or(chain))?));
        }
        let tls = Arc::new(Material { authorities, clients, skip_verify: self.skip_verify });
        Ok(Endpoint {
            base: self.base,
            can_pull: self.can_pull,
            can_resolve: self.can_resolve,
            tls,
            headers: self.headers,
            namespace: self.namespace,
            is_mirror: self.is_mirror,
        })
    }
}

const URL_REMEDY: &str = "give an http:// or https:// URL, such as \"https://registry.example\"";
const HOST_REMEDY: &str = "write [host.\"https://mirror.example\"]";
const FILE_REMEDY: &str = "give a file name, or a list of file names";
const PAIR_REMEDY: &str = "give a file name, or a list of [\"client.cert\", \"client.key\"] pairs";
const HEADER_REMEDY: &str = "give name = \"value\" or name = [\"value\", \"value\"]";
const CAPABILITIES_REMEDY: &str = "give a list of \"pull\", \"resolve\" and \"push\"";

/// The endpoints that `text`, the hosts.toml of `host` at `path`, names. An empty text yields the
/// registry itself.
pub fn parse(text: &str, path: &Path, host: &str) -> Result<Vec<Parsed>, Error> {
    // The error's own Display quotes the line, which may hold a header with a credential.
    let line = |at: usize| 1 + text.bytes().take(at).filter(|b| *b == b'\n').count();
    let table: Table = text.parse().map_err(|e: toml::de::Error| Error::Syntax {
        path: path.display().to_string(),
        line: e.span().map_or(1, |span| line(span.start)),
        message: e.message().to_owned(),
    })?;
    let reader = Reader { path, host };
    let mut parsed = Vec::new();
    if let Some(hosts) = table.get("host") {
        for (url, keys) in reader.table("host", hosts, HOST_REMEDY)? {
            let at = format!("host.{url:?}");
            let keys = reader.table(&at, keys, HOST_REMEDY)?;
            let base = reader.url(&at, url, keys)?;
            parsed.push(reader.endpoint(&format!("{at}."), base, false, keys)?);
        }
    }
    let (base, insecure) = match table.get("server") {
        Some(Value::String(server)) if !server.is_empty() => {
            (reader.url("server", server, &table)?, false)
        }
        None | Some(Value::String(_)) => default_url(host)?,
        Some(_) => return Err(reader.error("server", "is not a string", URL_REMEDY)),
    };
    parsed.push(reader.endpoint("", base, insecure, &table)?);
    Ok(parsed)
}

/// containerd's rule: https, but plain http on this machine's own addresses at an unusual port, and
/// https on this machine without a check of certificates.
fn default_url(host: &str) -> Result<(Url, bool), Error> {
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (host, None),
    };
    let local = is_local(name);
    let plain = local && !matches!(port, None | Some("443"));
    let authority = if host == "docker.io" { "registry-1.docker.io" } else { host };
    let scheme = if plain { "http" } else { "https" };
    let url = Url::parse(&format!("{scheme}://{authority}/v2"))
        .map_err(|_| Error::Host(host.to_owned()))?;
    Ok((url, local && !plain))
}

/// Reads keys for one file; `at` is the path of the table that the keys are in, with a dot.
struct Reader<'a> {
    path: &'a Path,
    host: &'a str,
}

impl Reader<'_> {
    fn endpoint(&self, at: &str, base: Url, insecure: bool, keys: &Table) -> Result<Parsed, Error> {
        let (can_pull, can_resolve) = self.capabilities(at, keys)?;
        let itself = default_url(self.host)
            .is_ok_and(|(own, _)| own.host_str() == base.host_str() && own.port() == base.port());
        Ok(Parsed {
            can_pull,
            can_resolve,
            authorities: self.authorities(at, keys)?,
            clients: self.clients(at, keys)?,
            skip_verify: self.boolean(at, keys, "skip_verify")?.unwrap_or(insecure),
            headers: self.headers(at, keys)?,
            namespace: (!itself).then(|| self.host.to_owned()),
            is_mirror: !at.is_empty(),
            base,
        })
    }

    /// The API's address from `text`, the value of `key`; `override_path` is among `keys`.
    fn url(&self, key: &str, text: &str, keys: &Table) -> Result<Url, Error> {
        let at = if key == "server" { String::new() } else { format!("{key}.") };
        let override_path = self.boolean(&at, keys, "override_path")?.unwrap_or(false);
        let full = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let mut url = Url::parse(&full)
            .map_err(|e| self.error(key, &format!("is not a URL ({e})"), URL_REMEDY))?;
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return Err(self.error(key, "is neither http nor https", URL_REMEDY));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let remedy = "put the credentials into config.json";
            return Err(self.error("server or host", "holds a user or a password", remedy));
        }
        let mut path = url.path().trim_end_matches('/').to_owned();
        if !override_path && !path.ends_with("/v2") {
            path.push_str("/v2");
        }
        url.set_path(&path);
        url.set_query(None);
        url.set_fragment(None);
        Ok(url)
    }

    /// Whether the endpoint serves blobs and manifests, and whether it may resolve tags.
    fn capabilities(&self, at: &str, keys: &Table) -> Result<(bool, bool), Error> {
        let key = format!("{at}capabilities");
        let list = match keys.get("capabilities") {
            None => return Ok((true, true)),
            Some(Value::Array(list)) if list.is_empty() => return Ok((true, true)),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.error(&key, "is not a list", CAPABILITIES_REMEDY)),
        };
        let (mut pull, mut resolve) = (false, false);
        for item in list {
            match item.as_str() {
                Some("pull") => pull = true,
                Some("resolve") => resolve = true,
                Some("push" | "referrers") => {}
                _ => {
                    return Err(self.error(&key, &format!("holds {item}"), CAPABILITIES_REMEDY));
                }
            }
        }
        Ok((pull, resolve))
    }

    fn authorities(&self, at: &str, keys: &Table) -> Result<Vec<PathBuf>, Error> {
        let key = format!("{at}ca");
        let refused = || self.error(&key, "is no file name", FILE_REMEDY);
        match keys.get("ca") {
            None => Ok(Vec::new()),
            Some(Value::String(path)) => Ok(vec![path.into()]),
            Some(Value::Array(paths)) => {
                paths.iter().map(|p| p.as_str().map(PathBuf::from).ok_or_else(refused)).collect()
            }
            Some(_) => Err(refused()),
        }
    }

    /// A file with certificate and key, or a list of such files and of pairs of files.
    fn clients(&self, at: &str, keys: &Table) -> Result<Vec<(PathBuf, Option<PathBuf>)>, Error> {
        let key = format!("{at}client");
        let refused =
            || self.error(&key, "is neither a file name nor a list of pairs", PAIR_REMEDY);
        let one = |value: &Value| {
            let names: Option<Vec<&str>> = match value {
                Value::String(file) => Some(vec![file]),
                Value::Array(pair) => pair.iter().map(Value::as_str).collect(),
                _ => None,
            };
            match names.as_deref() {
                Some([file] | [file, ""]) => Ok((file.into(), None)),
                Some([certificate, key]) => Ok((certificate.into(), Some(key.into()))),
                _ => Err(refused()),
            }
        };
        match keys.get("client") {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    fn headers(&self, at: &str, keys: &Table) -> Result<HeaderMap, Error> {
        let mut headers = HeaderMap::new();
        let Some(value) = keys.get("header") else { return Ok(headers) };
        let at = format!("{at}header");
        for (name, value) in self.table(&at, value, HEADER_REMEDY)? {
            let key = format!("{at}.{name:?}");
            let refused = || self.error(&key, "is no header", HEADER_REMEDY);
            let name = HeaderName::try_from(name.as_str()).map_err(|_| refused())?;
            let values = match value {
                Value::Array(values) => values.as_slice(),
                value => std::slice::from_ref(value),
            };
            for value in values {
                let text = value.as_str().ok_or_else(refused)?;
                let mut value = HeaderValue::from_str(text).map_err(|_| refused())?;
                value.set_sensitive(true);
                headers.append(name.clone(), value);
            }
        }
        Ok(headers)
    }

    fn boolean(&self, at: &str, keys: &Table, name: &str) -> Result<Option<bool>, Error> {
        let key = format!("{at}{name}");
        match keys.get(name) {
            None => Ok(None),
            Some(Value::Boolean(value)) => Ok(Some(*value)),
            Some(_) => Err(self.error(&key, "is not a boolean", "give true or false")),
        }
    }

    fn table<'v>(
        &self,
        key: &str,
        value: &'v Value,
        remedy: &'static str,
    ) -> Result<&'v Table, Error> {
        value.as_table().ok_or_else(|| self.error(key, "is not a table", remedy))
    }

    fn error(&self, key: &str, problem: &str, remedy: &'static str) -> Error {
        Error::Key {
            path: self.path.display().to_string(),
            key: key.chars().take(200).collect(),
            problem: problem.chars().take(200).collect(),
            remedy,
        }
    }
}
