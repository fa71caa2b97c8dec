//! Image references: `host/repository[:tag][@digest]`, with Docker's short forms spelled out.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// A fully qualified image reference. `debian` is `docker.io/library/debian:latest`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// Registry host with optional port, as containerd writes it: `docker.io`, `localhost:5000`.
    pub host: String,
    /// Repository path: `library/debian`.
    pub repository: String,
    pub tag: Option<String>,
    pub digest: Option<Digest>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("image reference {0:?} has no valid repository (a-z, 0-9, '.', '_', '-', '/')")]
    Repository(String),
    #[error("image reference {0:?} has no valid tag (up to 128 of A-Z, a-z, 0-9, '.', '_', '-')")]
    Tag(String),
    #[error("image reference {0:?} has no valid digest")]
    Digest(String, #[source] crate::digest::Error),
}

impl Reference {
    /// What a registry is asked for under `/manifests/`: the digest if there is one, else the tag.
    pub fn target(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (name, digest) = match text.split_once('@') {
            None => (text, None),
            Some((name, digest)) => {
                let digest = digest.parse().map_err(|e| Error::Digest(text.to_owned(), e))?;
                (name, Some(digest))
            }
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(Error::Tag(text.to_owned()));
        }
        let (host, repository) = match name.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest.to_owned()),
            Some(_) => ("docker.io", name.to_owned()),
            None => ("docker.io", format!("library/{name}")),
        };
        if !repository.split('/').all(is_component) || repository.len() > 255 {
            return Err(Error::Repository(text.to_owned()));
        }
        let tag = match (tag, &digest) {
            (None, None) => Some("latest"),
            (tag, _) => tag,
        };
        Ok(Self { host: host.to_owned(), repository, tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// Docker's rule: the first component is a host if it has a dot or a port, or is `localhost`.
fn is_host(component: &str) -> bool {
    let name = component.rsplit_once(':').map_or(component, |(name, _)| name);
    (component == "localhost" || component.contains(['.', ':']))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
        && component.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b))
}

/// distribution-spec: lower-case alphanumerics, joined by `.`, `_`, `__` or dashes.
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
        && bytes.iter().all(|b| alphanumeric(b) || b"._-".contains(b))
        && !component.contains("..")
}

fn is_tag(tag: &str) -> bool {
    let bytes = tag.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_')
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spells_out_short_forms() {
        let sha = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (input, expected) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:12", "docker.io/library/debian:12".to_owned()),
            ("grafana/loki", "docker.io/grafana/loki:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a/b:x", "localhost:5000/a/b:x".to_owned()),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest".to_owned()),
            (&format!("ghcr.io/a/b@{sha}"), format!("ghcr.io/a/b@{sha}")),
            (&format!("ghcr.io/a/b:t@{sha}"), format!("ghcr.io/a/b:t@{sha}")),
        ] {
            let reference: Reference = input.parse().unwrap();
            assert_eq!(reference.to_string(), expected);
            assert_eq!(expected.parse(), Ok(reference));
        }
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for input in
            ["", "/", "a//b", "UPPER", "a:", "a:-x", "a@b", "a@sha256:12", "../a", "a/..", "a b"]
        {
            assert!(input.parse::<Reference>().is_err(), "{input}");
        }
    }

    #[test]
    fn asks_for_the_digest_before_the_tag() {
        let digest = Digest::of(b"x");
        let reference: Reference = format!("a.io/b:tag@{digest}").parse().unwrap();
        assert_eq!(reference.target(), digest.to_string());
        assert_eq!("a.io/b:tag".parse::<Reference>().unwrap().target(), "tag");
    }
}
