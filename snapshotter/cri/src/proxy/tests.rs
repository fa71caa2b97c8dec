//! A proxy between a client and a containerd that is scripted.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{AuthConfig, ImageSpec, PullImageRequest};
use prost::Message as _;
use skimmer_registry::Credential;
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Server};
use tower::service_fn;

use super::*;

/// Answers every call with a status, and an echo where that is 0.
#[derive(Clone)]
struct Containerd {
    status: &'static str,
    seen: Arc<Mutex<Vec<(String, Bytes)>>>,
}

impl NamedService for Containerd {
    const NAME: &'static str = Proxy::NAME;
}

impl Service<Request<Body>> for Containerd {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.unwrap().to_bytes();
            this.seen.lock().unwrap().push((path, body.clone()));
            let answer = Response::builder().header("content-type", "application/grpc");
            if this.status != "0" {
                let answer = answer.header("grpc-status", this.status).header("grpc-message", "no");
                return Ok(answer.body(Body::empty()).unwrap());
            }
            let mut end = HeaderMap::new();
            end.insert("grpc-status", "0".parse().unwrap());
            let body = Full::new(body).with_trailers(async move { Some(Ok(end)) });
            Ok(answer.body(Body::new(body)).unwrap())
        })
    }
}

/// A proxy to a containerd that answers with `status`, and what that saw.
fn proxy(status: &'static str) -> (Proxy, Arc<Mutex<Vec<(String, Bytes)>>>) {
    let containerd = Containerd { status, seen: Arc::default() };
    let seen = Arc::clone(&containerd.seen);
    let connector = service_fn(move |_| {
        let containerd = containerd.clone();
        async move {
            let (ours, theirs) = UnixStream::pair()?;
            let served = Server::builder().add_service(containerd);
            let clients = tokio_stream::once(Ok::<_, std::io::Error>(theirs));
            tokio::spawn(served.serve_with_incoming(clients));
            Ok::<_, std::io::Error>(TokioIo::new(ours))
        }
    });
    let containerd =
        Endpoint::from_static("http://c.invalid").connect_with_connector_lazy(connector);
    let told = Told::open(Duration::from_secs(60), None);
    (Proxy { containerd, told, stage: None }, seen)
}

fn request(method: &str, message: &[u8]) -> Request<Body> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = Bytes::from([&[0][..], &length, message].concat());
    Request::post(format!("http://localhost/runtime.v1.ImageService/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Full::new(body)))
        .unwrap()
}

/// With a field that nobody knows yet.
fn pull(secret: &str) -> Vec<u8> {
    let image = ImageSpec { image: "r.example/a".to_owned(), ..ImageSpec::default() };
    let auth = AuthConfig {
        username: "u".to_owned(),
        password: secret.to_owned(),
        ..AuthConfig::default()
    };
    let request = PullImageRequest { image: Some(image), auth: Some(auth), sandbox_config: None };
    [request.encode_to_vec(), vec![0xfa, 0x3e, 3, 1, 2, 3]].concat()
}

fn password(secret: &str) -> Credential {
    Credential::Password { username: "u".to_owned(), secret: secret.to_owned() }
}

async fn body(response: Response<Body>) -> (Bytes, HeaderMap) {
    let collected = response.into_body().collect().await.unwrap();
    let trailers = collected.trailers().cloned().unwrap_or_default();
    (collected.to_bytes(), trailers)
}

#[tokio::test]
async fn calls_and_answers_are_handed_on_byte_for_byte() {
    let (mut proxy, seen) = proxy("0");
    for (method, message) in
        [("ListImages", &[1, 2, 3][..]), ("PullImage", &pull("p")), ("New", &[])]
    {
        let response = proxy.call(request(method, message)).await.unwrap();
        assert_eq!(response.headers()["content-type"], "application/grpc");
        let (answer, trailers) = body(response).await;
        assert_eq!((&answer[5..], &trailers["grpc-status"]), (message, &"0".parse().unwrap()));
        let (path, seen) = seen.lock().unwrap().pop().unwrap();
        assert_eq!((path, &seen[5..]), (format!("/runtime.v1.ImageService/{method}"), message));
    }
}

#[tokio::test]
async fn credentials_are_kept_if_the_pull_succeeds() {
    let (mut good, _) = proxy("0");
    let known = |proxy: &Proxy| proxy.told.find("r.example", "a");
    good.call(request("PullImage", &pull("right"))).await.unwrap();
    assert!(known(&good) == [password("right")]);
    let (mut bad, _) = proxy("13");
    bad.told = good.told.clone();
    let answer = bad.call(request("PullImage", &pull("wrong"))).await.unwrap();
    assert_eq!(
        (&answer.headers()["grpc-status"], &answer.headers()["grpc-message"]),
        (&"13".parse().unwrap(), &"no".parse().unwrap())
    );
    assert!(known(&bad) == [password("right")]);
    // What was good once isn't forgotten for a failure that may have any reason.
    bad.call(request("PullImage", &pull("right"))).await.unwrap();
    assert!(known(&bad) == [password("right")]);
}

struct Staging(Told, Result<(), Status>, Mutex<Vec<String>>);

#[async_trait]
impl Stage for Staging {
    async fn stage(&self, reference: &Reference) -> Result<(), Status> {
        let known = self.0.find(&reference.host, &reference.repository).len();
        self.2.lock().unwrap().push(format!("{reference} with {known}"));
        self.1.clone()
    }
}

#[tokio::test]
async fn blobs_are_staged_with_the_pulls_credentials_and_failing_to_fails_nothing() {
    for outcome in [Ok(()), Err(Status::unavailable("the registry is away"))] {
        let (mut proxy, seen) = proxy("0");
        let staging = Arc::new(Staging(proxy.told.clone(), outcome, Mutex::default()));
        proxy.stage = Some(Arc::clone(&staging) as Arc<dyn Stage>);
        proxy.call(request("ListImages", &[])).await.unwrap();
        let answer = proxy.call(request("PullImage", &pull("p"))).await.unwrap();
        assert_eq!(&body(answer).await.0[5..], pull("p"));
        assert_eq!(*staging.2.lock().unwrap(), ["r.example/a:latest with 1"]);
        assert_eq!(seen.lock().unwrap().len(), 2);
    }
}

#[tokio::test]
async fn a_pull_that_cannot_be_read_here_is_containerds() {
    let (mut proxy, seen) = proxy("0");
    for message in [&b"\xff"[..], &[]] {
        proxy.call(request("PullImage", message)).await.unwrap();
        assert_eq!(&seen.lock().unwrap().pop().unwrap().1[5..], message);
    }
}

#[tokio::test]
async fn without_containerd_the_answer_says_so() {
    let gone =
        service_fn(|_| async { Err::<TokioIo<UnixStream>, _>(std::io::Error::other("gone")) });
    let containerd = Endpoint::from_static("http://c.invalid").connect_with_connector_lazy(gone);
    let mut proxy = Proxy { containerd, told: Told::default(), stage: None };
    let answer = proxy.call(request("ImageStatus", &[])).await.unwrap();
    let status = Status::from_header_map(answer.headers()).unwrap();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert!(status.message().contains("doesn't reach containerd"), "{status}");
}
