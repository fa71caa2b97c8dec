//! The token endpoint's protocol (distribution-spec's "token authentication"): what to ask for, and
//! what the answer is worth. Pure.

use std::time::{Duration, SystemTime};

use reqwest::Url;
use reqwest::header::HeaderValue;
use serde::Deserialize;

use crate::challenge::Challenge;

pub const CLIENT_ID: &str = "skimmer";
/// What a token lives for if its issuer doesn't say.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// A token is renewed this long before it expires, or after three quarters of its life.
const MARGIN: Duration = Duration::from_secs(30);

/// A registry's demand for a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    pub realm: Url,
    pub service: Option<String>,
    pub scopes: Vec<String>,
}

impl Demand {
    /// Reads a Bearer challenge for pulling `repository` (none when only the API's root was asked).
    pub fn new(challenge: &Challenge, repository: &str) -> Option<Self> {
        let realm = Url::parse(challenge.parameter("realm")?).ok()?;
        let named = challenge.parameter("scope").unwrap_or_default();
        let mut scopes: Vec<String> = named.split_whitespace().map(str::to_owned).collect();
        if scopes.is_empty() && !repository.is_empty() {
            scopes.push(format!("repository:{repository}:pull"));
        }
        let usable = matches!(realm.scheme(), "http" | "https") && realm.has_host();
        let service = challenge.parameter("service").map(str::to_owned);
        usable.then_some(Self { realm, service, scopes })
    }

    /// The URL to GET, with user and password or nobody's.
    pub fn url(&self) -> Url {
        let mut url = self.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = &self.service {
                query.append_pair("service", service);
            }
            for scope in &self.scopes {
                query.append_pair("scope", scope);
            }
        }
        url
    }

    /// The form to POST for an identity token (OAuth2, RFC 6749 §6).
    pub fn form(&self, identity: &str) -> String {
        // The same escaping as a query's.
        let mut url = self.realm.clone();
        url.set_query(None);
        url.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.service.as_deref().unwrap_or_default())
            .append_pair("client_id", CLIENT_ID)
            .append_pair("scope", &self.scopes.join(" "))
            .append_pair("refresh_token", identity);
        url.query().unwrap_or_default().to_owned()
    }
}

/// A token and how long it may be used, counted from the request for it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub header: HeaderValue,
    pub usable: Duration,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
    #[serde(default)]
    issued_at: Option<String>,
}

/// Reads the answer of the token endpoint; `server_now` is its own clock (its Date header), against
/// which it dates the token.
pub fn parse(body: &[u8], server_now: Option<SystemTime>) -> Option<Token> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let named = [answer.token, answer.access_token].into_iter().flatten();
    let header = bearer(&named.into_iter().find(|token| !token.is_empty())?)?;
    let life = match answer.expires_in {
        Some(seconds) if seconds > 0.0 => {
            Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_LIFE).min(LONGEST_LIFE)
        }
        _ => DEFAULT_LIFE,
    };
    let issued = answer.issued_at.and_then(|text| humantime::parse_rfc3339(&text).ok());
    let age = server_now.zip(issued).and_then(|(now, issued)| now.duration_since(issued).ok());
    let left = life.saturating_sub(age.unwrap_or_default());
    Some(Token { header, usable: left.saturating_sub(MARGIN.min(left / 4)) })
}

/// `Authorization: Bearer …`; `None` if the token holds what a header can't.
pub fn bearer(token: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::challenge;

    fn demand(header: &str) -> Option<Demand> {
        Demand::new(&challenge::parse(header.as_bytes())[0], "a/b")
    }

    #[test]
    fn asks_for_what_the_registry_demands() {
        for (header, url) in [
            (
                r#"Bearer realm="https://auth.io/token",service="r.io",scope="repository:a/b:pull""#,
                Some("https://auth.io/token?service=r.io&scope=repository%3Aa%2Fb%3Apull"),
            ),
            (
                r#"Bearer realm="https://auth.io/token?x=y""#,
                Some("https://auth.io/token?x=y&scope=repository%3Aa%2Fb%3Apull"),
            ),
            (
                r#"Bearer realm="https://auth.io/",scope="s:1 s:2""#,
                Some("https://auth.io/?scope=s%3A1&scope=s%3A2"),
            ),
            (r#"Bearer realm="file:///etc/passwd""#, None),
            ("Bearer", None),
        ] {
            let asked = demand(header).map(|d| d.url().to_string());
            assert_eq!(asked.as_deref(), url, "{header}");
        }
        let form = demand(r#"Bearer realm="https://a.io/t",service="r""#).unwrap().form("i&d");
        assert_eq!(
            form,
            "grant_type=refresh_token&service=r&client_id=skimmer&scope=repository%3Aa%2Fb%3Apull&refresh_token=i%26d"
        );
    }

    #[test]
    fn renews_before_the_token_expires() {
        let now = humantime::parse_rfc3339("2024-01-01T00:10:00Z").unwrap();
        for (body, expected) in [
            (r#"{"token": "t"}"#, Some(45)),
            (r#"{"access_token": "t", "expires_in": 300}"#, Some(270)),
            (
                r#"{"token": "t", "expires_in": 300, "issued_at": "2024-01-01T00:09:00Z"}"#,
                Some(210),
            ),
            (r#"{"token": "t", "expires_in": 300, "issued_at": "2023-01-01T00:00:00Z"}"#, Some(0)),
            (
                r#"{"token": "t", "expires_in": 300, "issued_at": "2025-01-01T00:00:00Z"}"#,
                Some(270),
            ),
            (r#"{"token": "t", "expires_in": 1e300}"#, Some(24 * 3600 - 30)),
            (r#"{"token": "t", "expires_in": -1}"#, Some(45)),
            (r#"{"token": ""}"#, None),
            (r#"{"token": "a\nb"}"#, None),
            (r#"{}"#, None),
            ("<html>", None),
        ] {
            let token = parse(body.as_bytes(), Some(now));
            assert_eq!(token.map(|t| t.usable.as_secs()), expected, "{body}");
        }
    }

    proptest! {
        #[test]
        fn any_answer_is_read_or_refused(bytes: Vec<u8>, expires: f64, issued: String, token: String) {
            parse(&bytes, None);
            let body = serde_json::json!({"token": token, "expires_in": expires, "issued_at": issued});
            if let Some(token) = parse(body.to_string().as_bytes(), Some(SystemTime::UNIX_EPOCH)) {
                prop_assert!(token.usable <= LONGEST_LIFE);
                prop_assert!(token.header.is_sensitive());
            }
        }
    }
}
