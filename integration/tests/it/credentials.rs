//! Private images: credentials that plugins hand out and that change; and where none of them ends up.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::Version;
use skimmer_integration::docker_config;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::{http, skimmerd};

use crate::fixtures::small;
use crate::indexes;

pub const USER: &str = "alice";
pub const PASSWORD: &str = "w0nderland-s3cret";

pub fn basic() -> Auth {
    Auth::Basic { user: USER, password: PASSWORD }
}

pub fn token(lifetime: Duration) -> Auth {
    Auth::Token { user: USER, password: PASSWORD, lifetime }
}

/// kubelet's files for a plugin that hands out what is in the file `password`.
fn provider(scenario: &Scenario, host: &str) -> anyhow::Result<(PathBuf, PathBuf)> {
    let folder = scenario.path("providers");
    std::fs::create_dir_all(&folder)?;
    let program = folder.join("test-provider");
    let script = format!(
        "#!/bin/sh\ncat >/dev/null\n\
         echo '{{\"kind\":\"CredentialProviderResponse\",\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\
         \"cacheKeyType\":\"Registry\",\"auth\":{{\"{host}\":{{\"username\":\"{USER}\",\"password\":\"'\"$(cat {password})\"'\"}}}}}}'\n",
        password = scenario.path("password").display(),
    );
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let config = scenario.path("providers.yaml");
    let text = format!(
        "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n\
         - name: test-provider\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n\
         \x20 matchImages: ['{host}/private']\n  defaultCacheDuration: 12h\n"
    );
    std::fs::write(&config, text)?;
    Ok((config, folder))
}

#[test]
fn kubelets_plugins_are_asked_and_asked_again_when_the_password_changes() {
    for (name, auth) in [("basic", basic()), ("token", token(Duration::from_secs(60)))] {
        scenario(&format!("credential-provider-{name}"), |scenario| {
            let registry = Registry::start_with(scenario, "private", &auth, None)?;
            let image = small(scenario, "private/app")?;
            let reference = registry.add(&image)?;
            let setup = Setup {
                skimmerd: skimmerd::Setup {
                    credential_providers: Some(provider(scenario, registry.address())?),
                    metrics: http::free_address()?,
                    log_level: "trace",
                    ..skimmerd::Setup::default()
                },
                ..Setup::default()
            };
            let node = Node::start_with(scenario, Version::V1_7, &setup)?;
            let pull = ["pull", &reference];
            std::fs::write(scenario.path("password"), "of-yesterday")?;
            command::failure_of(&mut node.skimmerd.skimmer(&pull)?, PATIENCE)?;
            std::fs::write(scenario.path("password"), PASSWORD)?;
            command::wait_for("the plugin is asked again", Duration::from_secs(30), || {
                node.skimmerd.ask(&pull).ok()
            })?;
            node.containerd.run_image(&reference, "skimmer", "private", &["true"])?;
            let encoded = STANDARD.encode(format!("{USER}:{PASSWORD}"));
            nowhere(&node, &[PASSWORD, "of-yesterday", &encoded])
        });
    }
}

#[test]
fn a_changed_config_json_is_used_at_once() {
    scenario("config-json-rotates", |scenario| {
        let registry = Registry::start_with(scenario, "private", &basic(), None)?;
        let image = small(scenario, "private/app")?;
        let reference = registry.add(&image)?;
        let config = scenario.path("config.json");
        let setup = Setup {
            skimmerd: skimmerd::Setup {
                docker_config: Some(config.clone()),
                ..skimmerd::Setup::default()
            },
            ..Setup::default()
        };
        let mut node = Node::start_with(scenario, Version::V2, &setup)?;
        docker_config::log_in(&config, &[registry.address()], USER, PASSWORD)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.skimmerd.ask(&["pull", &reference])?;
        // In the middle of an image's life: what is read later is asked for with the new one.
        docker_config::log_in(&config, &[registry.address()], USER, "of-yesterday")?;
        node.skimmerd.expect_log("private/app");
        let mut pull = node.skimmerd.skimmer(&["index", "build", &reference])?;
        let said = command::failure_of(&mut pull, PATIENCE)?;
        anyhow::ensure!(said.contains("refused the credentials"), "{said}");
        docker_config::log_in(&config, &[registry.address()], USER, PASSWORD)?;
        let read = ["md5sum", "/data/private-app"];
        node.containerd.run_image(&reference, "skimmer", "private", &read)?;
        Ok(())
    });
}

/// None of `secrets` is in what skimmerd logged, serves or keeps, nor in what its command prints.
pub fn nowhere(node: &Node, secrets: &[&str]) -> anyhow::Result<()> {
    let mut places = vec![("the log".to_owned(), node.skimmerd.log().into_bytes())];
    for arguments in [&["status"][..], &["images"], &["peers"], &["doctor"]] {
        let said = command::finish(&mut node.skimmerd.skimmer(arguments)?, PATIENCE)?;
        places.push((format!("skimmer {}", arguments[0]), [said.stdout, said.stderr].concat()));
    }
    let metrics = http::get(node.skimmerd.metrics(), "/metrics")?;
    anyhow::ensure!(metrics.contains("# EOF"), "metrics: {metrics}");
    places.push(("/metrics".to_owned(), metrics.into_bytes()));
    files(&node.skimmerd.root(), &mut |path, bytes| {
        places.push((path.display().to_string(), bytes));
    })?;
    for (place, bytes) in places {
        for secret in secrets {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            anyhow::ensure!(!found, "{place} has the secret {secret:?}");
        }
    }
    Ok(())
}

/// Every file that skimmerd keeps, but for mounts and the bytes of images.
fn files(folder: &Path, found: &mut impl FnMut(&Path, Vec<u8>)) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
        let kind = kind?;
        if kind.is_dir() && !path.ends_with("snapshots/m") && !path.ends_with("fs") {
            files(&path, found)?;
        } else if kind.is_file() {
            match std::fs::read(&path) {
                // The daemon works meanwhile.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                read => found(&path, read?),
            }
        }
    }
    Ok(())
}
