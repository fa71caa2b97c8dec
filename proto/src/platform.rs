//! Platforms, and which manifest of an index suits one best. Pure.
//!
//! The rules are containerd's strict matcher's: variants of ARM fall back to lower ones, and no
//! architecture falls back to another.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// An operating system and a processor, in Go's words: `linux/arm64/v8`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
pub struct Platform {
    pub os: String,
    pub architecture: String,
    #[serde(default)]
    pub variant: Option<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("platform {0:?} is not of the form os/architecture[/variant], e.g. linux/amd64")]
pub struct Error(String);

impl Platform {
    /// This machine's.
    pub fn host() -> Self {
        let (os, architecture) = (std::env::consts::OS, std::env::consts::ARCH);
        Self { os: os.to_owned(), architecture: architecture.to_owned(), variant: None }
            .normalized()
    }

    /// The same platform in the usual words, with the variant that is meant where none is named.
    pub fn normalized(&self) -> Self {
        let given = self.variant.clone().filter(|v| !v.is_empty()).map(|v| v.to_lowercase());
        let given = given.map(|v| if v.starts_with('v') { v } else { format!("v{v}") });
        let (architecture, variant) = match self.architecture.to_lowercase().as_str() {
            "amd64" | "x86_64" | "x86-64" => ("amd64".to_owned(), given.filter(|v| v != "v1")),
            "386" | "i386" | "i486" | "i586" | "i686" | "x86" => ("386".to_owned(), None),
            "arm64" | "aarch64" => ("arm64".to_owned(), given.or(Some("v8".to_owned()))),
            "armhf" => ("arm".to_owned(), Some("v7".to_owned())),
            "armel" => ("arm".to_owned(), Some("v6".to_owned())),
            "arm" => ("arm".to_owned(), given.or(Some("v7".to_owned()))),
            "powerpc64" => ("ppc64le".to_owned(), given),
            other => (other.to_owned(), given),
        };
        Self { os: self.os.to_lowercase(), architecture, variant }
    }

    /// How well something built for `offered` runs here: `None` not at all, else 0 is best.
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normalized(), offered.normalized());
        if wanted.os != offered.os || wanted.architecture != offered.architecture {
            return None;
        }
        if wanted.variant == offered.variant {
            return Some(0);
        }
        let lowest = match wanted.architecture.as_str() {
            "amd64" => 10,
            "arm" => 50,
            "arm64" => 80,
            _ => return None,
        };
        let (wanted, offered) =
            (level(wanted.variant.as_deref())?, level(offered.variant.as_deref())?);
        (lowest <= offered && offered <= wanted).then(|| wanted - offered)
    }
}

/// A variant as a number that can be compared, in tenths: `v8.1` is 81; none is `v1`.
fn level(variant: Option<&str>) -> Option<u32> {
    let number = variant.unwrap_or("v1").strip_prefix('v')?;
    let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    (major < 1000 && minor < 10).then(|| major * 10 + minor)
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refused = || Error(text.chars().take(100).collect());
        let legal = |part: &&str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        let parts: Vec<&str> = text.split('/').collect();
        if !parts.iter().all(legal) {
            return Err(refused());
        }
        let (os, architecture, variant) = match parts[..] {
            [os, architecture] => (os, architecture, None),
            [os, architecture, variant] => (os, architecture, Some(variant.to_owned())),
            _ => return Err(refused()),
        };
        Ok(Self { os: os.to_owned(), architecture: architecture.to_owned(), variant }.normalized())
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(wanted: &str, offered: &str, expected: Option<u32>) {
        let (wanted, offered): (Platform, Platform) =
            (wanted.parse().unwrap(), offered.parse().unwrap());
        assert_eq!(wanted.rank(&offered), expected, "{wanted} on {offered}");
    }

    #[test]
    fn ranks_what_runs() {
        check("linux/amd64", "linux/amd64", Some(0));
        check("linux/x86_64", "linux/amd64/v1", Some(0));
        check("linux/amd64", "linux/amd64/v3", None);
        check("linux/amd64/v3", "linux/amd64", Some(20));
        check("linux/amd64/v3", "linux/amd64/v2", Some(10));
        check("linux/amd64", "linux/386", None);
        check("linux/amd64", "windows/amd64", None);
        check("linux/arm64", "linux/arm64", Some(0));
        check("linux/arm64/v8", "linux/aarch64", Some(0));
        check("linux/arm64/v8.2", "linux/arm64", Some(2));
        check("linux/arm64", "linux/arm64/v9", None);
        check("linux/arm64", "linux/arm/v7", None);
        check("linux/arm", "linux/arm/v7", Some(0));
        check("linux/arm/v7", "linux/arm/v6", Some(10));
        check("linux/arm/v6", "linux/arm/v7", None);
        check("linux/armhf", "linux/arm/7", Some(0));
        check("linux/s390x", "linux/s390x", Some(0));
        check("linux/amd64", "unknown/unknown", None);
    }

    #[test]
    fn refuses_what_is_no_platform() {
        for input in ["", "linux", "linux/", "a/b/c/d", "linux/../x", "linux/amd64 "] {
            assert!(input.parse::<Platform>().is_err(), "{input:?}");
        }
    }

    proptest! {
        #[test]
        fn any_words_are_compared(os: String, architecture in "(arm|arm64|amd64|.*)", variant: Option<String>) {
            let offered = Platform { os, architecture, variant };
            Platform::host().rank(&offered);
            prop_assert_eq!(offered.rank(&offered), Some(0));
        }
    }
}
