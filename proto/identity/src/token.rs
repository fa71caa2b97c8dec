//! Join tokens: how a node finds out whom to trust, and proves that it was asked in.
//!
//! As text: `sk1.<base64url of the root CA certificate's SHA-256>.<base64url of 32 secret bytes>`,
//! both without padding.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};

const PREFIX: &str = "sk1";
/// Characters of 32 bytes in base64url.
const FIELD: usize = 43;

#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// See [`crate::authority::fingerprint`].
    pub fingerprint: [u8; 32],
    pub secret: [u8; 32],
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error(
        "it isn't a join token: those look like sk1.….…, as `skimmer token create` prints them"
    )]
    Form,
    #[error("the system gives no random bytes")]
    Random,
}

impl JoinToken {
    /// A token with a fresh secret.
    pub fn generate(fingerprint: [u8; 32]) -> Result<Self, Error> {
        let mut secret = [0; 32];
        SystemRandom::new().fill(&mut secret).map_err(|_| Error::Random)?;
        Ok(Self { fingerprint, secret })
    }

    /// SHA-256 of the secret: all that the control plane keeps of it.
    pub fn hash(&self) -> [u8; 32] {
        let mut sum = [0; 32];
        sum.copy_from_slice(digest(&SHA256, &self.secret).as_ref());
        sum
    }
}

impl FromStr for JoinToken {
    type Err = Error;

    /// Blanks around it, as in a file, don't matter.
    fn from_str(text: &str) -> Result<Self, Error> {
        let mut parts = text.trim().split('.');
        if parts.next() != Some(PREFIX) {
            return Err(Error::Form);
        }
        let mut field = || {
            let part = parts.next().filter(|part| part.len() == FIELD).ok_or(Error::Form)?;
            let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| Error::Form)?;
            <[u8; 32]>::try_from(bytes).map_err(|_| Error::Form)
        };
        let (fingerprint, secret) = (field()?, field()?);
        match parts.next() {
            None => Ok(Self { fingerprint, secret }),
            Some(_) => Err(Error::Form),
        }
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [fingerprint, secret] =
            [self.fingerprint, self.secret].map(|bytes| URL_SAFE_NO_PAD.encode(bytes));
        write!(f, "{PREFIX}.{fingerprint}.{secret}")
    }
}

impl fmt::Debug for JoinToken {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{prop_assert_eq, proptest};

    #[test]
    fn is_read_as_it_is_written() {
        let token = JoinToken::generate([7; 32]).unwrap();
        let text = token.to_string();
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert_ne!(JoinToken::generate([7; 32]).unwrap().secret, token.secret);
        for wrong in [
            String::new(),
            "sk1".into(),
            "sk1..".into(),
            text.replace("sk1", "sk2"),
            text[..text.len() - 1].to_owned(),
            format!("{text}."),
            format!("{text}A"),
            text.replace('.', ","),
        ] {
            assert_eq!(wrong.parse::<JoinToken>(), Err(Error::Form), "{wrong}");
        }
    }

    #[test]
    fn keeps_its_secret_out_of_debug_output() {
        let token = JoinToken { fingerprint: [1; 32], secret: [0x55; 32] };
        assert_eq!(format!("{token:?}"), "JoinToken { .. }");
        assert_ne!(token.hash(), token.secret);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(sk1)?[.A-Za-z0-9_é-]{0,100}") {
            if let Ok(token) = text.parse::<JoinToken>() {
                prop_assert_eq!(token.to_string(), text);
            }
        }
    }
}
