//! docker's credential helpers: `docker-credential-NAME get`, with the server on its input.
//!
//! The protocol is docker's (docker/docker-credential-helpers): JSON with `Username` and `Secret` on
//! the output, or a message and a status other than 0.

use std::ffi::OsStr;
use std::io;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use super::{Credential, program};

const DEADLINE: Duration = Duration::from_secs(30);
const OUTPUT_BYTES: u64 = 64 << 10;
/// What the helpers print when they know nothing of a server.
const NOT_FOUND: &str = "credentials not found in native keychain";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "credential helper {0:?} of config.json is not a name: letters, digits, '.', '_' and '-'"
    )]
    Name(String),
    #[error(
        "run docker-credential-{helper}, which config.json names; is it installed and in PATH?"
    )]
    Run { helper: String, source: io::Error },
    #[error("docker-credential-{helper} did not answer for {server} within {DEADLINE:?}")]
    Slow { helper: String, server: String },
    #[error(
        "docker-credential-{helper} failed for {server}; try: echo {server} | docker-credential-{helper} get"
    )]
    Failed { helper: String, server: String },
    #[error(
        "docker-credential-{helper} answered for {server} with something that is no credential"
    )]
    Answer { helper: String, server: String },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    username: String,
    secret: String,
}

/// Asks helper `name`, found in the folders of `programs`, for the credential of `server`.
pub async fn get(name: &str, server: &str, programs: &OsStr) -> Result<Option<Credential>, Error> {
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(legal) {
        return Err(Error::Name(name.chars().take(64).collect()));
    }
    let (helper, server) = (name.to_owned(), server.to_owned());
    match tokio::time::timeout(DEADLINE, run(name, &server, programs)).await {
        Err(_) => Err(Error::Slow { helper, server }),
        Ok(Err(source)) => Err(Error::Run { helper, source }),
        Ok(Ok((true, output))) => match serde_json::from_slice::<Answer>(&output) {
            Err(_) => Err(Error::Answer { helper, server }),
            Ok(answer) if answer.secret.is_empty() => Ok(None),
            Ok(Answer { username, secret }) if username == "<token>" => {
                Ok(Some(Credential::Identity(secret)))
            }
            Ok(Answer { username, secret }) => Ok(Some(Credential::Password { username, secret })),
        },
        Ok(Ok((false, output))) if String::from_utf8_lossy(&output).contains(NOT_FOUND) => Ok(None),
        Ok(Ok((false, _))) => Err(Error::Failed { helper, server }),
    }
}

/// Whether the helper succeeded, and its output.
async fn run(name: &str, server: &str, programs: &OsStr) -> io::Result<(bool, Vec<u8>)> {
    let mut helper = Command::new(format!("docker-credential-{name}"));
    program::ask(helper.arg("get").env("PATH", programs), server, OUTPUT_BYTES).await
}
