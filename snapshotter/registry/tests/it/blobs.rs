//! Ranges of blobs from servers that are well or ill.

use std::error::Error as _;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use skimmer_cache::source::{Blame, BlobKind, BlobRef, Class, FetchError, Origin, Source};
use skimmer_proto::Digest;
use skimmer_registry::{Config, Registry};

use crate::server::{Answer, Request, Server, Then};

pub const LEN: usize = 300_000;

pub fn blob() -> Vec<u8> {
    (0..LEN).map(|i| (i * 31 % 251) as u8).collect()
}

pub fn blob_ref(host: &str) -> BlobRef {
    let origin = Origin { host: host.to_owned(), repository: "a/b".to_owned() };
    let digest = Digest::of(&blob());
    BlobRef { digest, len: LEN as u64, kind: BlobKind::Blob, origins: vec![origin] }
}

/// Short deadlines, so that a hanging client shows.
pub fn config() -> Config {
    Config {
        deadline: Duration::from_secs(20),
        response_timeout: Duration::from_millis(500),
        stall_timeout: Duration::from_millis(500),
        rounds: 3,
        ..Config::default()
    }
}

pub async fn fetch(
    registry: &Registry,
    host: &str,
    range: Range<u64>,
) -> Result<Vec<u8>, FetchError> {
    let stream = registry.fetch(&blob_ref(host), range, Class::Fault).await?;
    let chunks: Vec<Bytes> = stream.try_collect().await?;
    Ok(chunks.concat())
}

/// An error with its causes.
pub fn words(error: &FetchError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Fetches 1000..200_000 and requires the right bytes.
async fn check_ok(handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) -> Server {
    let server = Server::new(handler).await;
    let registry = Registry::new(config());
    let got = fetch(&registry, &server.host(), 1000..200_000).await;
    let got = got.unwrap_or_else(|e| panic!("{}", words(&e)));
    assert!(got == blob()[1000..200_000]);
    server
}

/// Fetches 1000..200_000 and requires an error with these words.
async fn check_err(
    handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    expected: &[&str],
    retryable: bool,
) -> Server {
    let server = Server::new(handler).await;
    let registry = Registry::new(config());
    let error = fetch(&registry, &server.host(), 1000..200_000).await.expect_err("an error");
    let text = words(&error);
    for word in expected {
        assert!(text.contains(word), "{text}: {word}");
    }
    assert!(text.contains("a/b"), "the error names the repository: {text}");
    assert_eq!((error.retryable, error.blame), (retryable, Blame::Registry), "{text}");
    server
}

#[tokio::test]
async fn a_good_server_is_asked_once_over_few_connections() {
    let server = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let registry = Registry::new(config());
    let got = fetch(&registry, &server.host(), 0..LEN as u64).await.unwrap();
    assert!(got == blob());
    for start in 0..10 {
        let range = start * 1000..start * 1000 + 500;
        let got = fetch(&registry, &server.host(), range.clone()).await.unwrap();
        assert!(got == blob()[range.start as usize..range.end as usize]);
    }
    let requests = server.requests();
    assert_eq!(requests.len(), 11);
    assert_eq!(requests[0].path, format!("/v2/a/b/blobs/{}", Digest::of(&blob())));
    assert_eq!(requests[0].header("range"), None);
    assert_eq!(requests[0].header("accept-encoding"), Some("identity"));
    assert_eq!(requests[3].header("range"), Some("bytes=2000-2499"));
    assert_eq!(server.connections(), 1, "connections are kept");
}

#[tokio::test]
async fn a_broken_connection_is_resumed() {
    let server = check_ok(|request, number| {
        let answer = Answer::blob(request, &blob()).with("etag", "\"strong\"");
        if number < 2 { answer.cut(70_000, Then::Close) } else { answer }
    })
    .await;
    let requests = server.requests();
    let ranges: Vec<_> = requests.iter().map(|r| r.range().unwrap()).collect();
    assert_eq!(ranges, [(1000, 200_000), (71_000, 200_000), (141_000, 200_000)]);
    assert_eq!(requests[0].header("if-range"), None);
    assert_eq!(requests[1].header("if-range"), Some("\"strong\""));
}

#[tokio::test]
async fn a_weak_etag_is_no_condition() {
    let server = check_ok(|request, number| {
        let answer = Answer::blob(request, &blob()).with("etag", "W/\"weak\"");
        if number == 0 { answer.cut(70_000, Then::Close) } else { answer }
    })
    .await;
    assert_eq!(server.requests()[1].header("if-range"), None);
}

#[tokio::test]
async fn less_than_asked_for_is_continued() {
    let server = check_ok(|request, _| {
        let (start, end) = request.range().unwrap();
        let end = end.min(start + 80_000);
        let range = format!("bytes {start}-{}/{LEN}", end - 1);
        Answer::new(206, &blob()[start..end]).with("content-range", &range)
    })
    .await;
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn a_server_without_ranges_is_used_all_the_same() {
    check_ok(|_, _| Answer::new(200, blob())).await;
    // Without an end, too: no more is read than was asked for.
    check_ok(|_, _| Answer::raw(200, blob(), Then::Endless)).await;
}

#[tokio::test]
async fn a_stall_is_noticed_and_resumed() {
    let server = check_ok(|request, number| {
        let answer = Answer::blob(request, &blob());
        if number == 0 { answer.cut(100_000, Then::Stall) } else { answer }
    })
    .await;
    assert_eq!(server.requests()[1].range(), Some((101_000, 200_000)));
    // Before the head, too.
    let server = check_ok(|request, number| match number {
        0 => Answer::raw(100, "", Then::Stall),
        _ => Answer::blob(request, &blob()),
    })
    .await;
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn busy_servers_are_asked_again_when_they_say() {
    let busy = |status: u16, after: &str| {
        let after = after.to_owned();
        check_ok(move |request, number| match number {
            0 => Answer::new(status, "").with("retry-after", &after),
            _ => Answer::blob(request, &blob()),
        })
    };
    let started = std::time::Instant::now();
    busy(429, "1").await;
    busy(503, "1").await;
    assert!(started.elapsed() >= Duration::from_secs(2));
    let date = std::time::SystemTime::now() + Duration::from_secs(2);
    busy(503, &httpdate::fmt_http_date(date)).await;
    assert!(started.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn a_flapping_server_is_asked_again_but_not_for_ever() {
    check_ok(|request, number| match number {
        0 => Answer::new(500, "oops"),
        1 => Answer::new(502, "<html>").with("content-type", "text/html"),
        _ => Answer::blob(request, &blob()),
    })
    .await;
    let server = check_err(|_, _| Answer::new(503, ""), &["503 Service Unavailable"], true).await;
    assert_eq!(server.requests().len(), 3);
    // A wish beyond the deadline is an answer.
    let long = |_: &Request, _| Answer::new(429, "").with("retry-after", "3600");
    assert_eq!(check_err(long, &["429"], true).await.requests().len(), 1);
    // A drip is no progress.
    let drip = |request: &Request, _| Answer::blob(request, &blob()).cut(10, Then::Close);
    assert_eq!(check_err(drip, &["a/b"], true).await.requests().len(), 3);
}

#[tokio::test]
async fn lies_are_typed_errors() {
    let with_range = |status, range: &str, body: &[u8]| {
        let answer = Answer::new(status, body).with("content-range", range);
        move |_: &Request, _: usize| answer.clone()
    };
    let data = blob();
    check_err(
        with_range(206, "bytes 0-198999/300000", &data[..199_000]),
        &["bytes 0-199000 when 1000-200000"],
        false,
    )
    .await;
    check_err(
        with_range(206, "bytes 1000-199999/12345", &data[..1000]),
        &["206 without a Content-Range that can be read"],
        false,
    )
    .await;
    check_err(
        with_range(206, "bytes 1000-199999/400000", &data[..1000]),
        &["has 400000 bytes, its descriptor says 300000"],
        false,
    )
    .await;
    check_err(
        with_range(206, "bytes 1000-199999/300000", &data[..1000]),
        &["body of 1000 bytes for a range of 199000"],
        false,
    )
    .await;
    check_err(
        |_, _| Answer::new(200, "<html>s3cret</html>").with("content-type", "text/html"),
        &["HTML page"],
        false,
    )
    .await;
    check_err(|_, _| Answer::new(200, "short"), &["has 5 bytes"], false).await;
    check_err(
        |_, _| Answer::new(200, blob()).with("content-encoding", "gzip"),
        &["encoded"],
        false,
    )
    .await;
    check_err(|_, _| Answer::new(416, ""), &["416"], false).await;
    check_err(
        |_, _| Answer::new(418, "<html>").with("content-type", "text/html"),
        &["418", "text/html"],
        false,
    )
    .await;
    check_err(
        |_, _| Answer::new(404, r#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown"}]}"#),
        &["does not exist: BLOB_UNKNOWN (blob unknown)"],
        false,
    )
    .await;
    check_err(|_, _| Answer::raw(500, "x".repeat(1000), Then::Endless), &["500"], true).await;
}

#[tokio::test]
async fn redirects_end() {
    let server = check_err(
        |request, _| Answer::redirect(&request.path.clone()),
        &["redirects in a circle"],
        false,
    )
    .await;
    assert_eq!(server.requests().len(), 1);
    let server = check_err(
        |request, number| {
            Answer::redirect(&format!(
                "{}/{number}?sig=s3cret",
                request.path.split('?').next().unwrap()
            ))
        },
        &["without end"],
        false,
    )
    .await;
    assert_eq!(server.requests().len(), 11);
    check_err(|_, _| Answer::redirect("file:///etc/passwd"), &["no address"], false).await;
}

#[tokio::test]
async fn a_redirect_is_followed_to_another_host() {
    let store = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let target = format!("http://{}/store/x?X-Amz-Signature=s3cret", store.host());
    check_ok(move |_, _| Answer::redirect(&target)).await;
    let requests = store.requests();
    assert_eq!(requests[0].path, "/store/x?X-Amz-Signature=s3cret");
    assert_eq!(requests[0].range(), Some((1000, 200_000)));
}

#[tokio::test]
async fn the_target_of_a_redirect_is_used_again_until_it_is_refused() {
    let store = Server::new(|request, _| match request.path.as_str() {
        "/store/0" | "/store/1" => Answer::blob(request, &blob()),
        _ => Answer::new(404, ""),
    })
    .await;
    let target = format!("http://{}/store/", store.host());
    let server = Server::new(move |_, number| Answer::redirect(&format!("{target}{number}"))).await;
    let registry = Registry::new(config());
    for start in [0, 1000, 2000] {
        fetch(&registry, &server.host(), start..start + 10).await.unwrap();
    }
    assert_eq!((server.requests().len(), store.requests().len()), (1, 3));

    let expired = Server::new(|request, number| match number {
        1 => Answer::new(403, "expired"),
        _ => Answer::blob(request, &blob()),
    })
    .await;
    let target = format!("http://{}/", expired.host());
    let server = Server::new(move |_, number| Answer::redirect(&format!("{target}{number}"))).await;
    for start in [0, 1000, 2000] {
        fetch(&registry, &server.host(), start..start + 10).await.unwrap();
    }
    let paths: Vec<_> = expired.requests().into_iter().map(|r| r.path).collect();
    assert_eq!(paths, ["/0", "/0", "/1", "/1"]);
}

#[tokio::test]
async fn presigned_urls_are_not_repeated_in_errors() {
    let store = Server::new(|_, _| {
        Answer::new(403, "<Error>s3cret</Error>").with("content-type", "application/xml")
    })
    .await;
    let target = format!("http://u:s3cret@{}/store/x?X-Amz-Signature=s3cret", store.host());
    let server = Server::new(move |_, _| Answer::redirect(&target)).await;
    let error = fetch(&Registry::new(config()), &server.host(), 0..10).await.unwrap_err();
    assert!(words(&error).contains("/store/x refused: 403"), "{}", words(&error));
    assert!(!format!("{} {error:?}", words(&error)).contains("s3cret"));
    // Nor when nobody listens there.
    let server = Server::new(|_, _| Answer::redirect("http://127.0.0.1:1/x?sig=s3cret")).await;
    let error = fetch(&Registry::new(config()), &server.host(), 0..10).await.unwrap_err();
    assert!(words(&error).contains("connect to http://127.0.0.1:1/x"), "{}", words(&error));
    assert!(!format!("{} {error:?}", words(&error)).contains("s3cret"));
}

#[tokio::test]
async fn many_ranges_at_once_use_several_connections() {
    let server = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let registry = Registry::new(Config { connections_per_host: 4, ..config() });
    let host = server.host();
    let ranges = (0..30u64).map(|i| i * 10_000..(i + 1) * 10_000);
    let parts: Vec<Vec<u8>> = futures::stream::iter(ranges)
        .map(|range| fetch(&registry, &host, range))
        .buffered(16)
        .try_collect()
        .await
        .unwrap();
    assert!(parts.concat() == blob());
    assert!((2..=8).contains(&server.connections()), "{}", server.connections());
}

#[tokio::test]
async fn nonsense_is_refused_before_anything_is_sent() {
    let server = Server::new(|request, _| Answer::blob(request, &blob())).await;
    let registry = Registry::new(config());
    for range in [0..0, 5..5, 0..LEN as u64 + 1] {
        let error = fetch(&registry, &server.host(), range).await.unwrap_err();
        assert_eq!(error.blame, Blame::Local);
    }
    for repository in ["../a", "a?b", "A", "a//b", ""] {
        let mut blob = blob_ref(&server.host());
        blob.origins[0].repository = repository.to_owned();
        assert!(registry.fetch(&blob, 0..1, Class::Fault).await.is_err(), "{repository}");
    }
    assert!(server.requests().is_empty());
}
