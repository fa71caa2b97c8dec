//! HTTPS with an authority of our own.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use skimmer_cache::source::Blame;
use skimmer_registry::{Config, Registry};
use tempfile::TempDir;

use crate::blobs::{blob, config, fetch, words};
use crate::server::{Answer, Request, Server};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate and its key, in PEM and as rustls wants them.
    fn issue(
        &self,
        name: &str,
    ) -> (String, String, CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (certificate.pem(), key.serialize_pem(), certificate.der().clone(), der)
    }

    /// A server; it asks for a client certificate, and insists on it if `strict`.
    async fn serve(
        &self,
        strict: Option<bool>,
        handler: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Server {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let (_, _, certificate, key) = self.issue("127.0.0.1");
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        let builder = match strict {
            None => builder.with_no_client_auth(),
            Some(true) => builder.with_client_cert_verifier(verifier.build().unwrap()),
            Some(false) => {
                builder.with_client_cert_verifier(verifier.allow_unauthenticated().build().unwrap())
            }
        };
        let config = builder.with_single_cert(vec![certificate], key).unwrap();
        Server::tls(config, handler).await
    }
}

/// A client with this hosts.toml for `server`.
fn client(folder: &TempDir, server: &Server, more: &str) -> Registry {
    let host = folder.path().join(server.host());
    fs::create_dir_all(&host).unwrap();
    let text = format!("server = \"https://{}\"\n{more}", server.host());
    fs::write(host.join("hosts.toml"), text).unwrap();
    Registry::new(Config { config_path: Some(folder.path().to_owned()), ..config() })
}

fn write(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    Path::new("..").join(name).display().to_string()
}

#[tokio::test]
async fn a_named_authority_is_trusted_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let server = authority.serve(None, |request, _| Answer::blob(request, &blob())).await;
    let ca = write(&folder, "ca.pem", &authority.pem());
    let other = write(&folder, "other.pem", &Authority::new().pem());
    let junk = write(&folder, "junk.pem", "junk");

    let registry = client(&folder, &server, &format!("ca = {ca:?}\n"));
    assert!(fetch(&registry, &server.host(), 0..1000).await.unwrap() == blob()[..1000]);
    let registry = client(&folder, &server, "skip_verify = true\n");
    assert!(fetch(&registry, &server.host(), 0..1000).await.is_ok());
    for (more, expected, blame) in [
        (
            String::new(),
            "certificate that is not trusted; name its authority in hosts.toml",
            Blame::Registry,
        ),
        (format!("ca = [{other:?}]\n"), "certificate that is not trusted", Blame::Registry),
        (format!("ca = {junk:?}\n"), "holds no certificate", Blame::Local),
        (
            format!("ca = {ca:?}\nclient = {junk:?}\n"),
            "holds no certificate with its key",
            Blame::Local,
        ),
    ] {
        let registry = client(&folder, &server, &more);
        let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
        assert!(words(&error).contains(expected), "{more}: {}", words(&error));
        assert_eq!((error.blame, error.retryable), (blame, false));
    }
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_its_endpoint_only() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let store = authority.serve(Some(true), |request, _| Answer::blob(request, &blob())).await;
    let target = format!("https://{}/x", store.host());
    let server = authority
        .serve(Some(true), move |request, _| match request.range() {
            Some((0, 20)) => Answer::redirect(&target),
            _ => Answer::blob(request, &blob()),
        })
        .await;
    let ca = write(&folder, "ca.pem", &authority.pem());
    let (certificate, key, ..) = authority.issue("node");
    let pair = [write(&folder, "c.pem", &certificate), write(&folder, "k.pem", &key)];

    let registry = client(&folder, &server, &format!("ca = {ca:?}\nclient = [{pair:?}]\n"));
    assert!(fetch(&registry, &server.host(), 0..10).await.is_ok());
    // The other host insists on one, and is not shown it.
    assert!(fetch(&registry, &server.host(), 0..20).await.is_err());
    assert!(store.requests().is_empty());
    let registry = client(&folder, &server, &format!("ca = {ca:?}\n"));
    assert!(fetch(&registry, &server.host(), 0..10).await.is_err());
}

#[tokio::test]
async fn encryption_is_never_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = write(&folder, "ca.pem", &authority.pem());
    let plain = Server::new(|request, _| Answer::blob(request, &blob())).await;

    let target = format!("http://{}/x?sig=s3cret", plain.host());
    let server = authority.serve(None, move |_, _| Answer::redirect(&target)).await;
    let registry = client(&folder, &server, &format!("ca = {ca:?}\n"));
    let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
    assert!(words(&error).contains("not encrypted; not followed"), "{}", words(&error));
    assert!(!words(&error).contains("s3cret"));

    let realm = format!("Bearer realm=\"http://{}/token\"", plain.host());
    let server = authority
        .serve(None, move |_, _| Answer::new(401, "").with("www-authenticate", &realm))
        .await;
    let registry = client(&folder, &server, &format!("ca = {ca:?}\n"));
    let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
    assert!(words(&error).contains("not encrypted; nothing was sent"), "{}", words(&error));
    assert!(plain.requests().is_empty());

    // A server that doesn't speak TLS at all.
    let registry = client(&folder, &plain, "");
    let error = fetch(&registry, &plain.host(), 0..10).await.unwrap_err();
    assert!(
        words(&error).contains("does not speak TLS; if it speaks plain HTTP"),
        "{}",
        words(&error)
    );
}

#[tokio::test]
async fn a_new_authority_is_trusted_once_its_file_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (old, new) = (Authority::new(), Authority::new());
    let server = new.serve(None, |request, _| Answer::blob(request, &blob())).await;
    let ca = write(&folder, "ca.pem", &old.pem());
    let registry = client(&folder, &server, &format!("ca = {ca:?}\n"));
    let error = fetch(&registry, &server.host(), 0..10).await.unwrap_err();
    assert!(words(&error).contains("certificate that is not trusted"), "{}", words(&error));
    write(&folder, "ca.pem", &(old.pem() + &new.pem()));
    let mut tries = 0;
    while fetch(&registry, &server.host(), 0..10).await.is_err() {
        tries += 1;
        assert!(tries < 200, "the new file is not read");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}
