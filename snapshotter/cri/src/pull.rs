//! A request to pull: bytes in, what they ask for out. Pure.

use k8s_cri::v1::{AuthConfig, PullImageRequest};
use prost::Message as _;
use skimmer_proto::Reference;
use skimmer_registry::{Credential, Written, server_host};

/// gRPC puts a flag and a length before each message.
const PREFIX: usize = 5;

/// What is asked for.
pub struct Pull {
    pub reference: Reference,
    /// With the host that it is for.
    pub credential: Option<(String, Credential)>,
}

impl Pull {
    /// `None` if the body is no request that can be read here: compressed, or for no image that has a name.
    pub fn of(body: &[u8]) -> Option<Self> {
        let (prefix, message) = body.split_first_chunk::<PREFIX>()?;
        let [0, length @ ..] = *prefix else { return None };
        if u32::from_be_bytes(length) as usize != message.len() {
            return None;
        }
        let request = PullImageRequest::decode(message).ok()?;
        let reference: Reference = request.image?.image.parse().ok()?;
        let credential = request.auth.and_then(|auth| credential(auth, &reference.host));
        Some(Self { reference, credential })
    }
}

/// As containerd takes it: for the server that it names, else for the image's.
fn credential(auth: AuthConfig, host: &str) -> Option<(String, Credential)> {
    let host = match auth.server_address.as_str() {
        "" => host.to_owned(),
        address => server_host(address),
    };
    let written = Written {
        auth: auth.auth,
        username: auth.username,
        password: auth.password,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    };
    Some((host, written.credential()??))
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use k8s_cri::v1::ImageSpec;
    use proptest::prelude::*;

    use super::*;

    fn body(image: &str, auth: Option<AuthConfig>) -> Vec<u8> {
        let image = Some(ImageSpec { image: image.to_owned(), ..ImageSpec::default() });
        let message = PullImageRequest { image, auth, sandbox_config: None }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0][..], &length, &message].concat()
    }

    fn password(secret: &str) -> Credential {
        Credential::Password { username: "u".to_owned(), secret: secret.to_owned() }
    }

    #[test]
    fn credentials_are_for_the_server_that_they_name_or_the_images() {
        let by_name = AuthConfig {
            username: "u".to_owned(),
            password: "p".to_owned(),
            ..AuthConfig::default()
        };
        let encoded = AuthConfig { auth: STANDARD.encode("u:p"), ..AuthConfig::default() };
        let elsewhere = AuthConfig {
            server_address: "https://mirror.example:5000/v1/".to_owned(),
            ..by_name.clone()
        };
        let identity = AuthConfig { identity_token: "id".to_owned(), ..AuthConfig::default() };
        let bearer = AuthConfig { registry_token: "t".to_owned(), ..AuthConfig::default() };
        let for_it = |credential| Some(("r.example".to_owned(), credential));
        for (auth, expected) in [
            (by_name, for_it(password("p"))),
            (encoded, for_it(password("p"))),
            (elsewhere, Some(("mirror.example:5000".to_owned(), password("p")))),
            (identity, for_it(Credential::Identity("id".to_owned()))),
            (bearer, for_it(Credential::Bearer("t".to_owned()))),
            (AuthConfig::default(), None),
            (AuthConfig { auth: "%".to_owned(), ..AuthConfig::default() }, None),
        ] {
            let pull = Pull::of(&body("r.example/a/b:1", Some(auth))).unwrap();
            assert_eq!(pull.reference.to_string(), "r.example/a/b:1");
            assert!(pull.credential == expected);
        }
        assert!(Pull::of(&body("debian", None)).unwrap().credential.is_none());
    }

    #[test]
    fn what_is_no_readable_request_is_left_alone() {
        let whole = body("r.example/a", None);
        let compressed = [&[1], &whole[1..]].concat();
        let longer = [&whole[..], &[0]].concat();
        for body in [&[][..], &whole[..4], &whole[..whole.len() - 1], &compressed, &longer] {
            assert!(Pull::of(body).is_none(), "{body:?}");
        }
        assert!(Pull::of(&body("No/Name", None)).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_left(message: Vec<u8>) {
            let _ = Pull::of(&message);
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            let _ = Pull::of(&[&[0][..], &length, &message].concat());
        }
    }
}
