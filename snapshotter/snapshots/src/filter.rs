//! containerd's filter language. Pure.
//!
//! ```text
//! selectors := selector ("," selector)*                 all of them
//! selector  := path [("==" | "!=" | "~=") value]        without an operator: is there a value?
//! path      := field ("." field)*                       name, parent, kind, labels.<key>
//! field     := quoted | [A-Za-z0-9_]+
//! value     := quoted | anything up to "," or a space
//! quoted    := a Go string in "…"; after "~=" also in /…/ or |…|
//! ```
//! (containerd's package `filters`.) Of several filters, any has to match.

mod parse;
#[cfg(test)]
mod tests;

use regex::bytes::{Regex, RegexBuilder};

use crate::Snapshot;
use crate::snapshot::REFERENCE_LABEL;

pub use parse::Error;

/// Bound on a compiled pattern.
const MAX_PATTERN_BYTES: usize = 1 << 20;

/// A parsed filter: all selectors must match.
#[derive(Debug)]
pub struct Filter(Vec<Selector>);

#[derive(Debug)]
struct Selector {
    field: Field,
    test: Test,
}

#[derive(Debug, PartialEq, Eq)]
enum Field {
    Name,
    Parent,
    Kind,
    Label(Vec<u8>),
    /// A snapshot has no such field.
    Unknown,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// `None` if the pattern isn't valid: matches nothing.
    Matches(Option<Regex>),
}

/// How to find the snapshots that a filter may match, without looking at all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    Name(String),
    /// Snapshots labelled with this chain ID, on this parent.
    Claim {
        reference: String,
        parent: String,
    },
    Children(String),
    Everything,
}

impl Filter {
    pub fn parse(text: &str) -> Result<Self, Error> {
        parse::filter(text)
    }

    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.0.iter().all(|selector| selector.matches(snapshot))
    }

    /// The narrowest look-up that finds all matches.
    pub fn lookup(&self) -> Lookup {
        let text = |wanted: &Field| {
            self.0.iter().find_map(|selector| match &selector.test {
                Test::Equal(value) if selector.field == *wanted => {
                    Some(String::from_utf8_lossy(value).into_owned())
                }
                _ => None,
            })
        };
        if let Some(name) = text(&Field::Name) {
            return Lookup::Name(name);
        }
        let reference = text(&Field::Label(REFERENCE_LABEL.as_bytes().to_vec()));
        match (reference, text(&Field::Parent)) {
            (Some(reference), Some(parent)) => Lookup::Claim { reference, parent },
            (_, Some(parent)) if !parent.is_empty() => Lookup::Children(parent),
            _ => Lookup::Everything,
        }
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = self.field.of(snapshot);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value == wanted),
            Test::NotEqual(wanted) => value.unwrap_or_default() != wanted,
            Test::Matches(pattern) => {
                pattern.as_ref().is_some_and(|pattern| pattern.is_match(value.unwrap_or_default()))
            }
        }
    }
}

impl Field {
    fn new(path: &[Vec<u8>]) -> Self {
        match path {
            [name, ..] if name == b"name" => Self::Name,
            [name, ..] if name == b"parent" => Self::Parent,
            [name, ..] if name == b"kind" => Self::Kind,
            [name, key @ ..] if name == b"labels" => Self::Label(key.join(&b'.')),
            _ => Self::Unknown,
        }
    }

    fn of<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a [u8]> {
        match self {
            Self::Name => Some(snapshot.name.as_bytes()),
            Self::Parent => Some(snapshot.parent.as_bytes()),
            Self::Kind => Some(snapshot.kind.name().as_bytes()),
            Self::Label(key) => {
                let key = str::from_utf8(key).ok()?;
                snapshot.labels.get(key).map(String::as_bytes)
            }
            Self::Unknown => None,
        }
    }
}

fn pattern(text: &[u8]) -> Option<Regex> {
    let text = str::from_utf8(text).ok()?;
    RegexBuilder::new(text).size_limit(MAX_PATTERN_BYTES).build().ok()
}
