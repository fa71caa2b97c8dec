//! kubelet's CredentialProviderConfig, and the requests and responses of the programs that it names. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::Error;
use super::matching::matches;
use crate::credentials::Credential;

/// Versions of the protocol: they differ in name only.
const VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

/// A program, and which images it is for.
pub struct Provider {
    pub name: String,
    patterns: Vec<String>,
    /// How long its answers are kept if they don't say.
    pub duration: Duration,
    version: String,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    kind: String,
    #[serde(default)]
    providers: Vec<WrittenProvider>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WrittenProvider {
    name: String,
    #[serde(default)]
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<Variable>>,
    #[serde(default)]
    token_attributes: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Variable {
    name: String,
    value: String,
}

/// Parses the file at `path`, YAML or JSON.
pub fn parse(text: &str, path: &str) -> Result<Vec<Provider>, Error> {
    // The error's own Display may quote a value.
    let written: Written = serde_yaml_ng::from_str(text).map_err(|error| Error::Syntax {
        path: path.to_owned(),
        line: error.location().map_or(0, |location| location.line()),
    })?;
    let wrong = |problem: String| Error::Content { path: path.to_owned(), problem };
    if written.kind != "CredentialProviderConfig" {
        return Err(wrong("its kind isn't CredentialProviderConfig".to_owned()));
    }
    written.providers.into_iter().map(|provider| provider.checked().map_err(wrong)).collect()
}

impl WrittenProvider {
    fn checked(self) -> Result<Provider, String> {
        let name = self.name;
        if name.is_empty() || name.contains(['/', ' ']) || matches!(name.as_str(), "." | "..") {
            return Err(format!("providers.name {name:?} is not the name of a program"));
        }
        if !VERSIONS.contains(&self.api_version.as_str()) {
            return Err(format!("provider {name}: apiVersion {:?} is unknown", self.api_version));
        }
        if self.token_attributes.is_some() {
            return Err(format!(
                "provider {name}: tokenAttributes asks for a pod's service account, which only kubelet has"
            ));
        }
        let duration = humantime::parse_duration(&self.default_cache_duration);
        let duration = duration.map_err(|_| {
            format!(
                "provider {name}: defaultCacheDuration {:?} is no duration such as 12h",
                self.default_cache_duration
            )
        })?;
        let variables = self.env.unwrap_or_default().into_iter();
        Ok(Provider {
            patterns: self.match_images,
            duration,
            version: self.api_version,
            arguments: self.args.unwrap_or_default(),
            environment: variables.map(|variable| (variable.name, variable.value)).collect(),
            name,
        })
    }
}

impl Provider {
    pub fn is_for(&self, image: &str) -> bool {
        self.patterns.iter().any(|pattern| matches(pattern, image))
    }

    /// What the program is asked.
    pub fn request(&self, image: &str) -> String {
        let kind = "CredentialProviderRequest";
        json!({ "apiVersion": self.version, "kind": kind, "image": image }).to_string()
    }
}

/// What an answer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Key {
    Image,
    Registry,
    Global,
}

impl Key {
    /// What it is kept under.
    pub fn of(self, host: &str, image: &str) -> String {
        match self {
            Self::Image => format!("image {image}"),
            Self::Registry => format!("registry {host}"),
            Self::Global => String::new(),
        }
    }
}

/// A program's answer.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Response {
    kind: String,
    cache_key_type: Key,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Account>>,
}

#[derive(Deserialize)]
struct Account {
    username: String,
    password: String,
}

impl Response {
    pub fn parse(output: &[u8]) -> Option<Self> {
        let response: Self = serde_json::from_slice(output).ok()?;
        let duration = response.cache_duration.as_deref();
        let is_sound = response.kind == "CredentialProviderResponse"
            && duration.is_none_or(|text| humantime::parse_duration(text).is_ok());
        is_sound.then_some(response)
    }

    pub const fn key(&self) -> Key {
        self.cache_key_type
    }

    /// How long it may be kept, if it says.
    pub fn duration(&self) -> Option<Duration> {
        self.cache_duration.as_deref().and_then(|text| humantime::parse_duration(text).ok())
    }

    /// Those for `image`, the closest pattern's first.
    pub fn credentials(&self, image: &str) -> Vec<Credential> {
        let mut fitting: Vec<_> =
            self.auth.iter().flatten().filter(|(pattern, _)| matches(pattern, image)).collect();
        fitting.sort_by_key(|(pattern, _)| std::cmp::Reverse(pattern.len()));
        let credential = |(_, account): (&String, &Account)| Credential::Password {
            username: account.username.clone(),
            secret: account.password.clone(),
        };
        fitting.into_iter().map(credential).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    const GOOD: &str = r#"
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: ecr-credential-provider
    matchImages:
      - "*.dkr.ecr.*.amazonaws.com"
    defaultCacheDuration: "12h"
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    args:
      - get-credentials
    env:
      - name: AWS_PROFILE
        value: example
"#;

    #[test]
    fn kubelets_file_is_read_as_yaml_and_as_json() {
        let providers = parse(GOOD, "c.yaml").unwrap();
        let provider = &providers[0];
        assert_eq!(provider.name, "ecr-credential-provider");
        assert_eq!(provider.duration, Duration::from_secs(12 * 3600));
        assert_eq!(provider.arguments, ["get-credentials"]);
        assert_eq!(provider.environment, [("AWS_PROFILE".to_owned(), "example".to_owned())]);
        assert!(provider.is_for("1.dkr.ecr.eu-west-1.amazonaws.com/a"));
        let json = r#"{"kind": "CredentialProviderConfig", "providers": [{"name": "a", "matchImages": ["b"],
            "defaultCacheDuration": "0s", "apiVersion": "credentialprovider.kubelet.k8s.io/v1beta1"}]}"#;
        assert_eq!(parse(json, "c.json").unwrap()[0].duration, Duration::ZERO);
    }

    #[test]
    fn a_wrong_file_is_named_and_not_quoted() {
        let change = |from: &str, to: &str| GOOD.replace(from, to);
        for (text, words) in [
            (change("kind: CredentialProviderConfig", "kind: s3cret"), "its kind isn't"),
            (change("ecr-credential-provider", "../sh"), "\"../sh\" is not the name"),
            (change("\"12h\"", "soon"), "\"soon\" is no duration"),
            (change(".io/v1\n    args", ".io/v9\n    args"), "apiVersion"),
            (change("        value: example", "        value: [s3cret]"), "c.yaml, line"),
            (format!("{GOOD}    tokenAttributes: {{}}\n"), "tokenAttributes"),
        ] {
            let error = parse(&text, "c.yaml").err().unwrap().to_string();
            assert!(error.contains(words) && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn the_closest_pattern_comes_first() {
        let output = br#"{"kind": "CredentialProviderResponse", "cacheKeyType": "Image", "auth": {
            "a.io": {"username": "all", "password": "p"}, "a.io/team": {"username": "team", "password": "p"},
            "b.io": {"username": "other", "password": "p"}}}"#;
        let response = Response::parse(output).unwrap();
        assert!(response.key() == Key::Image && response.duration().is_none());
        let users = |image: &str| -> Vec<String> {
            let name = |credential| match credential {
                Credential::Password { username, .. } => username,
                _ => String::new(),
            };
            response.credentials(image).into_iter().map(name).collect()
        };
        assert_eq!(users("a.io/team/app"), ["team", "all"]);
        assert_eq!(users("a.io/app"), ["all"]);
        assert!(users("c.io/app").is_empty());
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes in any::<Vec<u8>>(), text in any::<String>()) {
            let _ = Response::parse(&bytes);
            let _ = parse(&text, "c.yaml");
        }
    }
}
