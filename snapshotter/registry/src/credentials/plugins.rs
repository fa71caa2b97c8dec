//! kubelet's credential-provider plugins: programs that hand out short-lived credentials for some registries.
//!
//! Owns: the parsed CredentialProviderConfig, read anew when it changes, and what the programs said, for as long as
//! they allow. One call of a program at a time: who waits for the same answer gets it.
//! The protocol is kubelet's, `credentialprovider.kubelet.k8s.io/v1`: a request in JSON on the program's input, a
//! response on its output.

mod config;
mod matching;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::process::Command;

use self::config::{Key, Provider, Response};
use super::{Credential, FILE_BYTES, FileVersion};

/// kubelet waits as long.
const DEADLINE: Duration = Duration::from_secs(60);
const OUTPUT_BYTES: u64 = 1 << 20;
/// Answers kept of one program; all are forgotten when there are more.
const ANSWERS: usize = 1024;
/// How long an answer that the registry refused isn't asked for again.
const REFUSED_FRESH: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("read {path}, kubelet's CredentialProviderConfig")]
    Read { path: String, source: io::Error },
    #[error("{path} has more than {FILE_BYTES} bytes; is it kubelet's CredentialProviderConfig?")]
    TooLarge { path: String },
    #[error("{path}, line {line}: not kubelet's CredentialProviderConfig; correct that line")]
    Syntax { path: String, line: usize },
    #[error("{path}: {problem}")]
    Content { path: String, problem: String },
    #[error("run credential provider {program}; is it installed?")]
    Run { program: String, source: io::Error },
    #[error("credential provider {provider} did not answer for {image} within {DEADLINE:?}")]
    Slow { provider: String, image: String },
    #[error("credential provider {provider} failed for {image}")]
    Failed { provider: String, image: String },
    #[error(
        "credential provider {provider} answered for {image} with something that is no CredentialProviderResponse"
    )]
    Answer { provider: String, image: String },
}

pub struct Plugins {
    config: PathBuf,
    programs: PathBuf,
    read: Mutex<Option<(FileVersion, Arc<[Plugin]>)>>,
}

/// A program, and what it said.
struct Plugin {
    provider: Provider,
    answers: tokio::sync::Mutex<HashMap<String, Known>>,
}

struct Known {
    at: Instant,
    until: Instant,
    response: Arc<Response>,
}

impl Plugins {
    /// `config` is kubelet's `--image-credential-provider-config`, `programs` its `--image-credential-provider-bin-dir`.
    pub fn new(config: PathBuf, programs: PathBuf) -> Self {
        Self { config, programs, read: Mutex::default() }
    }

    pub fn version(&self) -> FileVersion {
        FileVersion::of(Some(&self.config))
    }

    /// What the plugins that are for `host/repository` hand out; `again`: afresh.
    pub async fn find(
        &self,
        host: &str,
        repository: &str,
        again: bool,
    ) -> Result<Vec<Credential>, super::Error> {
        let image = format!("{host}/{repository}");
        let (mut found, mut failed) = (Vec::new(), None);
        let plugins = self.plugins()?;
        for plugin in plugins.iter().filter(|plugin| plugin.provider.is_for(&image)) {
            match plugin.ask(&self.programs, host, &image, again).await {
                Ok(response) => found.extend(response.credentials(&image)),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if found.is_empty() => Err(error.into()),
            Some(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(image, error, "a credential provider was left out");
                Ok(found)
            }
            None => Ok(found),
        }
    }

    fn plugins(&self) -> Result<Arc<[Plugin]>, Error> {
        let version = self.version();
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plugins)) = read.as_ref().filter(|(at, _)| *at == version) {
            return Ok(Arc::clone(plugins));
        }
        let path = self.config.display().to_string();
        if version.len() > FILE_BYTES {
            return Err(Error::TooLarge { path });
        }
        let text = std::fs::read_to_string(&self.config);
        let text = text.map_err(|source| Error::Read { path: path.clone(), source })?;
        let providers = config::parse(&text, &path)?.into_iter();
        let plugin = |provider| Plugin { provider, answers: tokio::sync::Mutex::default() };
        let plugins: Arc<[Plugin]> = providers.map(plugin).collect();
        *read = Some((version, Arc::clone(&plugins)));
        Ok(plugins)
    }
}

impl Plugin {
    async fn ask(
        &self,
        programs: &Path,
        host: &str,
        image: &str,
        again: bool,
    ) -> Result<Arc<Response>, Error> {
        let mut answers = self.answers.lock().await;
        let now = Instant::now();
        answers.retain(|_, known| now < known.until);
        // Which key an answer is for, it says itself.
        let keys = [Key::Image, Key::Registry, Key::Global].map(|key| key.of(host, image));
        let fresh = |known: &&Known| !again || now.duration_since(known.at) < REFUSED_FRESH;
        if let Some(known) = keys.iter().find_map(|key| answers.get(key)).filter(fresh) {
            return Ok(Arc::clone(&known.response));
        }
        let response = Arc::new(self.call(programs, image).await?);
        let key = response.key().of(host, image);
        let at = Instant::now();
        let keeping = response.duration().unwrap_or(self.provider.duration);
        // Those who wait for it get this one even if it may not be kept.
        let until = at + keeping.max(REFUSED_FRESH);
        if answers.len() >= ANSWERS {
            answers.clear();
        }
        answers.insert(key, Known { at, until, response: Arc::clone(&response) });
        Ok(response)
    }

    async fn call(&self, programs: &Path, image: &str) -> Result<Response, Error> {
        let (provider, image) = (self.provider.name.clone(), image.to_owned());
        let program = programs.join(&provider);
        let request = self.provider.request(&image);
        match tokio::time::timeout(DEADLINE, self.run(&program, &request)).await {
            Err(_) => Err(Error::Slow { provider, image }),
            Ok(Err(source)) => Err(Error::Run { program: program.display().to_string(), source }),
            Ok(Ok((true, output))) => {
                Response::parse(&output).ok_or(Error::Answer { provider, image })
            }
            Ok(Ok((false, _))) => Err(Error::Failed { provider, image }),
        }
    }

    /// Whether the program succeeded, and its output.
    async fn run(&self, program: &Path, request: &str) -> io::Result<(bool, Vec<u8>)> {
        let mut plugin = Command::new(program);
        plugin.args(&self.provider.arguments).envs(self.provider.environment.iter().cloned());
        super::program::ask(&mut plugin, request, OUTPUT_BYTES).await
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A plugin that counts its calls, keeps what it was asked, and answers as it is told.
    fn plugin(folder: &Path, answer: &str) -> Plugins {
        let program = folder.join("test-provider");
        let script = format!(
            "#!/bin/sh\necho \"$1 $EXTRA\" >>{0}/calls\ncat >{0}/request\ncat <<'END'\n{answer}\nEND\n",
            folder.display()
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let config = folder.join("config.yaml");
        let text = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
                    - name: test-provider\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n\
                    \x20 matchImages: [\"*.example.com\"]\n  defaultCacheDuration: 10m\n\
                    \x20 args: [get]\n  env:\n  - {name: EXTRA, value: more}\n";
        fs::write(&config, text).unwrap();
        Plugins::new(config, folder.to_owned())
    }

    fn calls(folder: &Path) -> usize {
        fs::read_to_string(folder.join("calls")).unwrap_or_default().lines().count()
    }

    fn answer(key: &str, duration: &str) -> String {
        format!(
            r#"{{"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                "cacheKeyType": "{key}", "cacheDuration": {duration},
                "auth": {{"*.example.com": {{"username": "u", "password": "s3cret"}}}}}}"#
        )
    }

    #[tokio::test]
    async fn the_program_is_asked_as_kubelet_asks_it() {
        let folder = tempfile::tempdir().unwrap();
        let plugins = plugin(folder.path(), &answer("Registry", "null"));
        let found = plugins.find("r.example.com", "team/app", false).await.unwrap();
        let expected =
            Credential::Password { username: "u".to_owned(), secret: "s3cret".to_owned() };
        assert!(found == [expected]);
        let request = fs::read_to_string(folder.path().join("request")).unwrap();
        let request: serde_json::Value = serde_json::from_str(&request).unwrap();
        assert_eq!(request["image"], "r.example.com/team/app");
        assert_eq!(request["kind"], "CredentialProviderRequest");
        assert_eq!(request["apiVersion"], "credentialprovider.kubelet.k8s.io/v1");
        assert_eq!(fs::read_to_string(folder.path().join("calls")).unwrap(), "get more\n");
        assert!(plugins.find("example.com", "team/app", false).await.unwrap().is_empty());
        assert_eq!(calls(folder.path()), 1, "it isn't for that registry");
    }

    #[tokio::test]
    async fn answers_are_kept_as_they_say() {
        for (key, duration, expected) in [
            ("Image", "null", 3),
            ("Registry", "null", 2),
            ("Global", "null", 1),
            ("Global", "\"1h\"", 1),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let plugins = plugin(folder.path(), &answer(key, duration));
            for _ in 0..2 {
                for (host, repository) in
                    [("a.example.com", "x"), ("a.example.com", "y"), ("b.example.com", "x")]
                {
                    assert_eq!(plugins.find(host, repository, false).await.unwrap().len(), 1);
                }
            }
            assert_eq!(calls(folder.path()), expected, "{key} {duration}");
        }
    }

    #[tokio::test]
    async fn what_was_refused_is_asked_for_again_but_not_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let plugins = plugin(folder.path(), &answer("Registry", "null"));
        for again in [false, true, true] {
            plugins.find("a.example.com", "x", again).await.unwrap();
        }
        assert_eq!(calls(folder.path()), 1);
        tokio::time::sleep(REFUSED_FRESH).await;
        plugins.find("a.example.com", "x", true).await.unwrap();
        assert_eq!(calls(folder.path()), 2);
    }

    #[tokio::test]
    async fn failures_name_the_program_and_no_secrets() {
        let folder = tempfile::tempdir().unwrap();
        let plugins = plugin(folder.path(), "s3cret");
        let said = |error: super::super::Error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            format!("{error} {}", cause.unwrap_or_default())
        };
        let error = said(plugins.find("a.example.com", "x", false).await.err().unwrap());
        assert!(error.contains("test-provider") && !error.contains("s3cret"), "{error}");
        fs::remove_file(folder.path().join("test-provider")).unwrap();
        let error = said(plugins.find("a.example.com", "x", false).await.err().unwrap());
        assert!(error.contains("test-provider; is it installed?"), "{error}");
        fs::remove_file(folder.path().join("config.yaml")).unwrap();
        let error = said(plugins.find("a.example.com", "x", false).await.err().unwrap());
        assert!(error.contains("config.yaml"), "{error}");
    }
}
