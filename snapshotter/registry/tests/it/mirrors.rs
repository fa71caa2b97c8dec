//! hosts.toml at work: mirrors in order, and the registry behind them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use skimmer_cache::source::Blame;
use skimmer_proto::{Digest, Reference};
use skimmer_registry::{Config, Registry};
use tempfile::TempDir;

use crate::blobs::{blob, config, fetch, words};
use crate::server::{Answer, Server};

const HOST: &str = "registry.example";

/// A client for which `hosts.toml` of [`HOST`] is `text`.
pub fn with_hosts(text: &str) -> (TempDir, Registry) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), text);
    let config_path = Some(folder.path().to_owned());
    (folder, Registry::new(Config { config_path, ..config() }))
}

fn write(folder: &Path, text: &str) {
    fs::create_dir_all(folder.join(HOST)).unwrap();
    fs::write(folder.join(HOST).join("hosts.toml"), text).unwrap();
}

#[tokio::test]
async fn mirrors_are_asked_in_order_on_behalf_of_the_registry() {
    let empty = Server::new(|_, _| Answer::new(404, "")).await;
    let mirror = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let origin = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let (_folder, registry) = with_hosts(&format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}/v2/proxy\"]\noverride_path = true\n\
         [host.\"http://{}/v2/proxy\".header]\nx-mirror = \"yes\"\n",
        origin.host(),
        empty.host(),
        mirror.host(),
        mirror.host(),
    ));
    assert!(fetch(&registry, HOST, 0..1000).await.unwrap() == blob()[..1000]);
    let digest = Digest::of(&blob());
    assert_eq!(empty.requests()[0].path, format!("/v2/a/b/blobs/{digest}?ns={HOST}"));
    assert_eq!(empty.requests()[0].header("x-mirror"), None);
    assert_eq!(mirror.requests()[0].path, format!("/v2/proxy/a/b/blobs/{digest}?ns={HOST}"));
    assert_eq!(mirror.requests()[0].header("x-mirror"), Some("yes"));
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn a_mirror_that_fails_is_left_for_the_next() {
    let lying =
        Server::new(|_, _| Answer::new(206, "x").with("content-range", "bytes 7-7/300000")).await;
    let broken = Server::new(|request, _| {
        Answer::blob(request, &blob()).cut(100_000, crate::server::Then::Close)
    })
    .await;
    let origin = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let (_folder, registry) = with_hosts(&format!(
        "server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n[host.\"http://{}\"]\n[host.\"http://{}\"]\n",
        origin.host(),
        lying.host(),
        broken.host(),
    ));
    let got = fetch(&registry, HOST, 1000..299_000).await;
    assert!(got.unwrap_or_else(|e| panic!("{}", words(&e))) == blob()[1000..299_000]);
    assert_eq!(origin.requests()[0].range(), Some((101_000, 299_000)));
}

#[tokio::test]
async fn a_dead_mirror_is_waited_for_once() {
    let dead = Server::new(|_, _| Answer::raw(100, "", crate::server::Then::Stall)).await;
    let origin = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let text =
        format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", origin.host(), dead.host());
    let (_folder, registry) = with_hosts(&text);
    fetch(&registry, HOST, 0..10).await.unwrap();
    let started = Instant::now();
    for _ in 0..5 {
        fetch(&registry, HOST, 0..10).await.unwrap();
    }
    assert!(started.elapsed() < Duration::from_millis(500));
    assert_eq!(dead.requests().len(), 1);
}

#[tokio::test]
async fn a_name_that_nobody_knows_may_be_known_later() {
    let origin = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let unknown = "http://registry.invalid";
    let text = format!("server = \"{unknown}\"\n[host.\"http://{}\"]\n", origin.host());
    let (_folder, registry) = with_hosts(&text);
    assert!(fetch(&registry, HOST, 0..10).await.unwrap() == blob()[..10]);
    let (_folder, registry) = with_hosts(&format!("server = \"{unknown}\"\n"));
    let error = fetch(&registry, HOST, 0..10).await.unwrap_err();
    assert!(error.retryable && words(&error).contains("registry.invalid"), "{}", words(&error));
}

#[tokio::test]
async fn the_registrys_own_error_is_reported() {
    let origin =
        Server::new(|_, _| Answer::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN"}]}"#)).await;
    let text = format!("server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n", origin.host());
    let (_folder, registry) = with_hosts(&text);
    let error = fetch(&registry, HOST, 0..10).await.unwrap_err();
    assert!(words(&error).contains("BLOB_UNKNOWN"), "{}", words(&error));
}

#[tokio::test]
async fn capabilities_are_kept() {
    let mirror = Server::new(|_, _| Answer::new(404, "")).await;
    let origin = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let (_folder, registry) = with_hosts(&format!(
        "server = \"http://{}\"\ncapabilities = [\"pull\"]\n[host.\"http://{}\"]\ncapabilities = [\"resolve\"]\n",
        origin.host(),
        mirror.host(),
    ));
    fetch(&registry, HOST, 0..10).await.unwrap();
    assert!(mirror.requests().is_empty());
    let reference: Reference = format!("{HOST}/a/b:tag").parse().unwrap();
    assert!(registry.resolve(&reference, None).await.is_err());
    assert_eq!((mirror.requests().len(), origin.requests().len()), (1, 1));
}

#[tokio::test]
async fn a_wrong_file_is_this_nodes_fault() {
    let (folder, registry) = with_hosts("server = 1\n");
    let error = fetch(&registry, HOST, 0..10).await.unwrap_err();
    assert_eq!((error.blame, error.retryable), (Blame::Local, false));
    let path = folder.path().join(HOST).join("hosts.toml");
    let text = words(&error);
    assert!(text.contains(&path.display().to_string()) && text.contains("key server"), "{text}");
    let (_folder, registry) = with_hosts("server = \"http://x\"\ncapabilities = [\"push\"]\n");
    let error = fetch(&registry, HOST, 0..10).await.unwrap_err();
    assert!(
        words(&error).contains("no endpoint with the capability \"pull\""),
        "{}",
        words(&error)
    );
}

#[tokio::test]
async fn ping_says_how_each_endpoint_is() {
    let good = Server::new(|_, _| Answer::new(200, "{}")).await;
    let (_folder, registry) = with_hosts(&format!(
        "server = \"http://{}\"\n[host.\"http://127.0.0.1:1\"]\n",
        good.host()
    ));
    let answers = registry.ping(HOST).await.unwrap();
    assert_eq!((answers[0].ok, answers[0].url.as_str()), (false, "http://127.0.0.1:1/v2"));
    assert!(answers[0].words.contains("connect to http://127.0.0.1:1/v2/"), "{}", answers[0].words);
    assert_eq!((answers[1].ok, answers[1].words.as_str()), (true, "answers"));
    assert_eq!(good.requests()[0].path, format!("/v2/?ns={HOST}"));
}
