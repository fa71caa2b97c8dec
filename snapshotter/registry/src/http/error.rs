//! How a request fails, whose fault that is, and whether to try again.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::time::Duration;

use reqwest::StatusCode;
use skimmer_cache::source::Blame;

use crate::auth;
use crate::range;
use crate::redact::{PlainUrl, Quote};
use crate::tls;

/// No variant holds a credential or a URL's query.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("connect to {url}")]
    Connect { url: PlainUrl, source: reqwest::Error },
    #[error(
        "{url} does not speak TLS; if it speaks plain HTTP, say so in hosts.toml: server = \"http://…\""
    )]
    NotTls { url: PlainUrl, source: reqwest::Error },
    #[error(
        "{url} has a certificate that is not trusted; name its authority in hosts.toml: ca = \"…\""
    )]
    Untrusted { url: PlainUrl, source: reqwest::Error },
    #[error("send a request to {url}")]
    Send { url: PlainUrl, source: reqwest::Error },
    #[error("read the answer of {url}")]
    Body { url: PlainUrl, source: reqwest::Error },
    #[error("{url} took too long: {phase}")]
    Slow { url: PlainUrl, phase: Phase },
    #[error("{url} ended its answer {missing} bytes early")]
    Short { url: PlainUrl, missing: u64 },
    #[error("{url} gave a wrong answer to a request for a range")]
    Range { url: PlainUrl, source: range::Error },
    #[error("set up TLS for {url}")]
    Tls { url: PlainUrl, source: tls::Error },
    #[error("authenticate to {host}")]
    Auth { host: String, source: Box<auth::Error> },
    #[error("{url} refused: {status}{said}{}", advice(*.as_nobody))]
    Refused { url: PlainUrl, status: StatusCode, said: Quote, as_nobody: bool },
    #[error("{url} does not exist{said}")]
    NotFound { url: PlainUrl, said: Quote },
    #[error("{url} answered {status}{said}")]
    Status { url: PlainUrl, status: StatusCode, said: Quote, retry_after: Option<Duration> },
    #[error("{url} redirects to what is no address")]
    RedirectNowhere { url: PlainUrl },
    #[error("{url} redirects to {to}, which is not encrypted; not followed")]
    RedirectDowngrade { url: PlainUrl, to: PlainUrl },
    #[error("{url} leads through {hops} redirects in a circle, or without end")]
    RedirectLoop { url: PlainUrl, hops: usize },
}

/// What was being waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Turn,
    Token,
    Head,
    Body,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Turn => "all connections to it were in use",
            Self::Token => "no token within the deadline",
            Self::Head => "no answer within the deadline",
            Self::Body => "no more bytes within the deadline",
        })
    }
}

fn advice(as_nobody: bool) -> &'static str {
    if as_nobody { "; no credentials were sent: docker login may be needed" } else { "" }
}

impl Error {
    /// What a failure to send a request is.
    pub fn sending(url: PlainUrl, error: reqwest::Error) -> Self {
        let source = error.without_url();
        match tls_cause(&source) {
            Some(rustls::Error::InvalidCertificate(_)) => Self::Untrusted { url, source },
            Some(rustls::Error::InvalidMessage(_)) => Self::NotTls { url, source },
            _ if source.is_connect() => Self::Connect { url, source },
            _ => Self::Send { url, source },
        }
    }

    /// Whether the same request may succeed at the same endpoint in a while.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Send { .. }
            | Self::Body { .. }
            | Self::Slow { .. }
            | Self::Short { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429)
            }
            Self::Auth { source, .. } => source.is_retryable(),
            Self::NotTls { .. }
            | Self::Untrusted { .. }
            | Self::Range { .. }
            | Self::Tls { .. }
            | Self::Refused { .. }
            | Self::NotFound { .. }
            | Self::RedirectNowhere { .. }
            | Self::RedirectDowngrade { .. }
            | Self::RedirectLoop { .. } => false,
        }
    }

    /// The pause that the server asked for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            Self::Auth { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    pub fn blame(&self) -> Blame {
        match self {
            Self::Refused { .. } => Blame::Refused,
            Self::Auth { source, .. } if source.is_refusal() => Blame::Refused,
            Self::Auth { source, .. } if source.is_local() => Blame::Local,
            Self::Tls { .. } => Blame::Local,
            _ => Blame::Registry,
        }
    }
}

/// The TLS error below `error`, which is wrapped in I/O errors.
fn tls_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // What an I/O error wraps is not its source, but the source of its source is.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}
