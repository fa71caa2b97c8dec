//! Getting in, and keeping secrets.

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use skimmer_cache::source::Blame;
use skimmer_registry::{Config, Credential, Places, Registry, Told};
use tempfile::TempDir;

use crate::blobs::{blob, config, fetch, words};
use crate::server::{Answer, Request, Server, Then};

/// A registry client with this config.json.
fn with_docker_config(json: &serde_json::Value) -> (TempDir, Registry) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, json.to_string()).unwrap();
    let credentials = Places { docker_config: Some(path), ..Places::default() };
    let registry = Registry::new(Config { credentials, ..config() });
    (folder, registry)
}

fn user(host: &str) -> serde_json::Value {
    // user:s3cret
    serde_json::json!({"auths": {host: {"auth": "dXNlcjpzM2NyZXQ="}}})
}

const BASIC: &str = "Basic dXNlcjpzM2NyZXQ=";

/// Hands out tokens `t0`, `t1`, …
async fn issuer(expires: f64) -> Server {
    Server::new(move |_, number| {
        let body = serde_json::json!({"token": format!("t{number}"), "expires_in": expires});
        Answer::new(200, body.to_string())
    })
    .await
}

fn challenge(realm: &str) -> Answer {
    let scope = "repository:a/b:pull";
    let challenge = format!("Bearer realm=\"{realm}\",service=\"reg\",scope=\"{scope}\"");
    Answer::new(401, "{}").with("www-authenticate", &challenge)
}

/// A registry that wants a token whose number is at least `oldest`.
async fn token_registry(issuer: &Server, oldest: Arc<AtomicUsize>) -> Server {
    let realm = format!("http://{}/token", issuer.host());
    Server::new(move |request, _| {
        let token = request.header("authorization").and_then(|h| h.strip_prefix("Bearer t"));
        match token.and_then(|number| number.parse::<usize>().ok()) {
            Some(number) if number >= oldest.load(Ordering::SeqCst) => {
                Answer::blob(request, &blob())
            }
            _ => challenge(&realm),
        }
    })
    .await
}

#[tokio::test]
async fn one_token_serves_many_requests() {
    let issuer = issuer(300.0).await;
    let server = token_registry(&issuer, Arc::default()).await;
    let registry = Registry::new(config());
    let host = server.host();
    let parts: Vec<Vec<u8>> =
        futures::stream::iter((0..30u64).map(|i| i * 10_000..(i + 1) * 10_000))
            .map(|range| fetch(&registry, &host, range))
            .buffered(16)
            .try_collect()
            .await
            .unwrap();
    assert!(parts.concat() == blob());
    let asked = issuer.requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].method, "GET");
    assert_eq!(asked[0].path, "/token?service=reg&scope=repository%3Aa%2Fb%3Apull");
    assert_eq!(asked[0].header("authorization"), None);
}

#[tokio::test]
async fn a_password_goes_to_the_token_endpoint_only() {
    let issuer = issuer(300.0).await;
    let server = token_registry(&issuer, Arc::default()).await;
    let (_folder, registry) = with_docker_config(&user(&server.host()));
    fetch(&registry, &server.host(), 0..10).await.unwrap();
    assert_eq!(issuer.requests()[0].header("authorization"), Some(BASIC));
    let sent: Vec<_> =
        server.requests().iter().map(|r| r.header("authorization").map(str::to_owned)).collect();
    assert_eq!(sent, [None, Some("Bearer t0".to_owned())]);
}

#[tokio::test]
async fn an_identity_token_is_posted() {
    let issuer = Server::new(|_, _| Answer::new(200, r#"{"access_token": "t0"}"#)).await;
    let server = token_registry(&issuer, Arc::default()).await;
    let json = serde_json::json!({"auths": {server.host(): {"identitytoken": "i&d"}}});
    let (_folder, registry) = with_docker_config(&json);
    fetch(&registry, &server.host(), 0..10).await.unwrap();
    let asked = &issuer.requests()[0];
    assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/token"));
    assert!(asked.body.contains("grant_type=refresh_token"), "{}", asked.body);
    assert!(asked.body.contains("refresh_token=i%26d"), "{}", asked.body);
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let issuer = issuer(0.2).await;
    let server = token_registry(&issuer, Arc::default()).await;
    let registry = Registry::new(config());
    while issuer.requests().len() < 3 {
        fetch(&registry, &server.host(), 0..10).await.unwrap();
    }
    // Only the very first request was sent without one.
    let refused = server.requests().iter().filter(|r| r.header("authorization").is_none()).count();
    assert_eq!(refused, 1);
}

#[tokio::test]
async fn a_token_refused_in_the_middle_is_replaced() {
    let issuer = issuer(300.0).await;
    let oldest = Arc::new(AtomicUsize::new(0));
    let realm = format!("http://{}/token", issuer.host());
    let limit = Arc::clone(&oldest);
    let server = Server::new(move |request, number| {
        let token = request.header("authorization").and_then(|h| h.strip_prefix("Bearer t"));
        let number_of_token = token.and_then(|t| t.parse::<usize>().ok());
        match number_of_token {
            Some(t) if t >= limit.load(Ordering::SeqCst) => {
                let answer = Answer::blob(request, &blob());
                if number < 3 {
                    limit.fetch_add(1, Ordering::SeqCst);
                    return answer.cut(100_000, Then::Close);
                }
                answer
            }
            _ => challenge(&realm),
        }
    })
    .await;
    let registry = Registry::new(config());
    let got = fetch(&registry, &server.host(), 0..300_000).await;
    assert!(got.unwrap_or_else(|e| panic!("{}", words(&e))) == blob());
    assert!(issuer.requests().len() >= 2);
}

#[tokio::test]
async fn an_endpoint_that_wants_something_else_is_asked_what() {
    let is_open = Arc::new(AtomicBool::new(false));
    let (of_issuer, of_server) = (Arc::clone(&is_open), Arc::clone(&is_open));
    // Nobody hands out tokens any more once nobody wants any.
    let issuer = Server::new(move |_, _| match of_issuer.load(Ordering::SeqCst) {
        true => Answer::new(404, "{}"),
        false => Answer::new(200, r#"{"token": "t0", "expires_in": 0.001}"#),
    })
    .await;
    let realm = format!("http://{}/token", issuer.host());
    let server = Server::new(move |request, _| {
        let has_token = request.header("authorization") == Some("Bearer t0");
        if has_token || of_server.load(Ordering::SeqCst) {
            Answer::blob(request, &blob())
        } else {
            challenge(&realm)
        }
    })
    .await;
    let registry = Registry::new(config());
    fetch(&registry, &server.host(), 0..10).await.unwrap();
    is_open.store(true, Ordering::SeqCst);
    for _ in 0..100 {
        if fetch(&registry, &server.host(), 0..10).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("it goes on asking for tokens");
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    let store = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let target = format!("http://{}/blob", store.host());
    let server = Server::new(move |request, _| match request.header("authorization") {
        None => Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\""),
        // First to another path here, then away.
        Some(_) if !request.path.contains("/moved") => Answer::redirect("/moved"),
        Some(_) => Answer::redirect(&target),
    })
    .await;
    let (folder, _) = with_docker_config(&user(&server.host()));
    let hosts = folder.path().join(server.host());
    fs::create_dir(&hosts).unwrap();
    let text = format!("server = \"http://{}\"\n[header]\nx-own = \"s3cret\"\n", server.host());
    fs::write(hosts.join("hosts.toml"), text).unwrap();
    let registry = Registry::new(Config {
        credentials: Places {
            docker_config: Some(folder.path().join("config.json")),
            ..Places::default()
        },
        config_path: Some(folder.path().to_owned()),
        ..config()
    });
    assert!(fetch(&registry, &server.host(), 0..1000).await.unwrap() == blob()[..1000]);
    let here = server.requests();
    let moved = here.iter().find(|r| r.path == "/moved").unwrap();
    assert_eq!(moved.header("authorization"), Some(BASIC));
    assert_eq!(moved.header("x-own"), Some("s3cret"));
    let there = &store.requests()[0];
    assert_eq!((there.header("authorization"), there.header("x-own")), (None, None));
}

/// Fetches and requires a refusal with these words.
async fn check_refused(
    handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    user_known: bool,
    expected: &[&str],
    requests: usize,
) {
    let server = Server::new(handler).await;
    let known = if user_known { user(&server.host()) } else { serde_json::json!({}) };
    let (_folder, registry) = with_docker_config(&known);
    let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
    let text = words(&error);
    for word in expected {
        assert!(text.contains(word), "{text}: {word}");
    }
    assert_eq!((error.blame, error.retryable), (Blame::Refused, false), "{text}");
    assert_eq!(server.requests().len(), requests, "{text}");
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let basic = |_: &Request, _: usize| Answer::new(401, "").with("www-authenticate", "Basic");
    check_refused(basic, false, &["config.json has none", "run docker login 127.0.0.1"], 1).await;
    check_refused(basic, true, &["refused the credentials of config.json"], 2).await;
    let denied = r#"{"errors":[{"code":"DENIED","message":"requested access is denied"}]}"#;
    let forbidden = move |_: &Request, _: usize| Answer::new(403, denied);
    let advice = ["refused: 403 Forbidden: DENIED (requested access is denied)", "docker login"];
    check_refused(forbidden, false, &advice, 1).await;
    let issuer =
        Server::new(|_, _| Answer::new(401, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#)).await;
    let realm = format!("http://{}/token?s3cret", issuer.host());
    let words = ["/token gave no token, but status 401 Unauthorized: UNAUTHORIZED"];
    check_refused(move |_, _| challenge(&realm), true, &words, 1).await;
}

#[tokio::test]
async fn a_strange_demand_is_an_error() {
    let server =
        Server::new(|_, _| Answer::new(401, "").with("www-authenticate", "Negotiate")).await;
    let error = fetch(&Registry::new(config()), &server.host(), 0..10).await.unwrap_err();
    assert!(
        words(&error).contains("no way to authenticate that is known here"),
        "{}",
        words(&error)
    );
}

#[tokio::test]
async fn a_failing_helper_does_not_hide_public_images() {
    let issuer = issuer(300.0).await;
    let server = token_registry(&issuer, Arc::default()).await;
    let json = serde_json::json!({"credsStore": "skimmer-test-does-not-exist"});
    let (_folder, registry) = with_docker_config(&json);
    assert!(fetch(&registry, &server.host(), 0..10).await.unwrap() == blob()[..10]);
}

#[tokio::test]
async fn changed_credentials_are_used_at_once() {
    let server = Server::new(|request, _| match request.header("authorization") {
        Some(BASIC) => Answer::blob(request, &blob()),
        _ => Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    let wrong =
        serde_json::json!({"auths": {server.host(): {"username": "user", "password": "x"}}});
    let (folder, registry) = with_docker_config(&wrong);
    assert!(fetch(&registry, &server.host(), 0..10).await.is_err());
    fs::write(folder.path().join("config.json"), user(&server.host()).to_string()).unwrap();
    assert!(fetch(&registry, &server.host(), 0..10).await.is_ok());
}

#[tokio::test]
async fn told_credentials_come_after_the_files_and_may_change() {
    let password = |secret: &str| Credential::Password {
        username: "user".to_owned(),
        secret: secret.to_owned(),
    };
    let server = Server::new(|request, _| match request.header("authorization") {
        Some(BASIC) => Answer::blob(request, &blob()),
        _ => Answer::new(401, "").with("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let told = Told::open(Duration::from_secs(60), None);
    let credentials =
        Places { docker_config: Some(path.clone()), told: told.clone(), ..Places::default() };
    let registry = Registry::new(Config { credentials, ..config() });
    let host = server.host();
    assert!(fetch(&registry, &host, 0..10).await.is_err());
    told.remember(&host, "a/other", &password("s3cret"));
    assert!(fetch(&registry, &host, 0..10).await.is_err());
    told.remember(&host, "a/b", &password("s3cret"));
    assert!(fetch(&registry, &host, 0..10).await.is_ok());
    // Yesterday's, in the file and told.
    let stale = serde_json::json!({"auths": {host.clone(): {"username": "user", "password": "x"}}});
    fs::write(path, stale.to_string()).unwrap();
    told.remember(&host, "a/b", &password("of-yesterday"));
    assert!(fetch(&registry, &host, 0..10).await.is_ok());
    told.forget(&host, "a/b", &password("s3cret"));
    assert!(fetch(&registry, &host, 0..10).await.is_err());
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_secret_is_logged_or_part_of_an_error() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("debug,skimmer_registry=trace")
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let issuer = Server::new(|_, number| match number {
        0 => Answer::new(500, "s3cret"),
        _ => Answer::new(200, r#"{"token": "s3cret-token"}"#),
    })
    .await;
    let realm = format!("http://{}/token?key=s3cret", issuer.host());
    let server = Server::new(move |request, number| match request.header("authorization") {
        None => challenge(&realm),
        Some(_) if number < 3 => Answer::redirect(&format!("{}?sig=s3cret", request.path)),
        // Servers that repeat what they were sent.
        Some(sent) => {
            let body = serde_json::json!({"errors": [{"code": "NO", "message": format!("{sent} at http://x/?k=s3cret")}]});
            Answer::new(500, body.to_string())
        }
    })
    .await;
    let (_folder, registry) = with_docker_config(&user(&server.host()));
    let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
    let said = format!("{} {error:?} {error:#?}", words(&error));
    tokio::time::sleep(Duration::from_millis(1)).await;
    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(said.contains("NO ("), "{said}");
    assert!(logged.contains("a request failed"), "{logged}");
    for text in [said, logged] {
        assert!(!text.contains("s3cret") && !text.contains(&BASIC[6..]), "{text}");
    }
}
