//! Configuration files: TOML, every key with a default, and no key that isn't known.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read configuration {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("configuration {path} is not valid TOML")]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("configuration {path}: unknown key `{key}`; the nearest known one is `{nearest}`")]
    UnknownKey { path: PathBuf, key: String, nearest: String },
    #[error("configuration {path}: a value is not valid")]
    Value { path: PathBuf, source: Box<toml::de::Error> },
    #[error("configuration {path}: `{key}` must be at least 1")]
    Zero { path: PathBuf, key: &'static str },
    #[error("configuration {path}: `{key}` must have the form {expected}")]
    Form { path: PathBuf, key: &'static str, expected: &'static str },
}

/// Settings whose serialized default names every key.
pub trait Settings: Default + Serialize + DeserializeOwned {}

impl<T: Default + Serialize + DeserializeOwned> Settings for T {}

/// The settings in the file `path`.
pub fn load<T: Settings>(path: &Path) -> Result<T, Error> {
    let text =
        fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

/// The settings in `text`; `path` is for messages only.
pub fn parse<T: Settings>(path: &Path, text: &str) -> Result<T, Error> {
    let path = path.to_owned();
    let table: toml::Table = match toml::from_str(text) {
        Ok(table) => table,
        Err(source) => return Err(Error::Syntax { path, source: source.into() }),
    };
    let known = known_keys::<T>();
    let mut given = Vec::new();
    keys_of(&table, "", &mut given);
    for key in given {
        let is_section = known.iter().any(|k| k.starts_with(&format!("{key}.")));
        if !known.contains(&key) && !is_section {
            return Err(Error::UnknownKey { path, nearest: nearest(&key, &known), key });
        }
    }
    // From the text, not the table, so that the message shows the line.
    toml::from_str(text).map_err(|source| Error::Value { path, source: source.into() })
}

/// An error for the first of `values` that is 0.
pub fn at_least_one(path: &Path, values: &[(&'static str, usize)]) -> Result<(), Error> {
    match values.iter().find(|(_, value)| *value == 0) {
        Some((key, _)) => Err(Error::Zero { path: path.to_owned(), key }),
        None => Ok(()),
    }
}

/// Whether `text` holds every key, at its default, below a comment that explains it.
///
/// # Errors
/// What is wrong with it, for a test to print.
pub fn check_annotated<T: Settings>(text: &str) -> Result<(), String> {
    let given: T = parse(Path::new("annotated"), text).map_err(|e| e.to_string())?;
    let table = |settings: &T| toml::Table::try_from(settings).map_err(|e| e.to_string());
    if table(&given)? != table(&T::default())? {
        return Err("its values aren't the defaults".into());
    }
    let mut listed = Vec::new();
    keys_of(&toml::from_str(text).map_err(|e| e.to_string())?, "", &mut listed);
    for key in known_keys::<T>() {
        if !listed.contains(&key) {
            return Err(format!("`{key}` isn't listed"));
        }
    }
    let lines: Vec<&str> = text.lines().collect();
    let assignment = |line: &str| line.contains(" = ") && !line.starts_with('#');
    match lines.windows(2).find(|two| assignment(two[1]) && !two[0].starts_with('#')) {
        Some(two) => Err(format!("no comment above {:?}", two[1])),
        None => Ok(()),
    }
}

/// Dotted names of all keys, from the defaults.
fn known_keys<T: Settings>() -> Vec<String> {
    let mut keys = Vec::new();
    if let Ok(table) = toml::Table::try_from(T::default()) {
        keys_of(&table, "", &mut keys);
    }
    keys
}

fn keys_of(table: &toml::Table, prefix: &str, keys: &mut Vec<String>) {
    for (name, value) in table {
        let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            toml::Value::Table(inner) if !inner.is_empty() => keys_of(inner, &key, keys),
            _ => keys.push(key),
        }
    }
}

/// The known key most like `key`, by the whole dotted name and by its last part.
fn nearest(key: &str, known: &[String]) -> String {
    let last = |k: &str| k.rsplit('.').next().unwrap_or(k).to_owned();
    known
        .iter()
        .map(|k| (strsim::jaro_winkler(key, k) + strsim::jaro_winkler(&last(key), &last(k)), k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or_else(String::new, |(_, k)| k.clone())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Pond {
        depth: u32,
        plants: Plants,
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    struct Plants {
        names: Vec<String>,
    }

    impl Default for Pond {
        fn default() -> Self {
            Self { depth: 3, plants: Plants::default() }
        }
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(parse::<Pond>(Path::new("f"), "").unwrap(), Pond::default());
    }

    #[test]
    fn an_annotated_file_is_complete_and_explained() {
        for (text, expected) in [
            ("# d\ndepth = 3\n[plants]\n# n\nnames = []\n", ""),
            ("# d\ndepth = 4\n[plants]\n# n\nnames = []\n", "defaults"),
            ("# d\ndepth = 3\n", "plants.names"),
            ("# d\ndepth = 3\n[plants]\nnames = []\n", "no comment"),
            ("# d\ndepht = 3\n", "unknown key `depht`"),
        ] {
            let outcome = check_annotated::<Pond>(text);
            assert_eq!(outcome.is_ok(), expected.is_empty(), "{text}: {outcome:?}");
            let found = outcome.err().unwrap_or_default();
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn zero_is_named() {
        let error = at_least_one(Path::new("f"), &[("a", 1), ("b", 0)]).unwrap_err();
        assert_eq!(error.to_string(), "configuration f: `b` must be at least 1");
        assert!(at_least_one(Path::new("f"), &[("a", 1)]).is_ok());
    }
}
