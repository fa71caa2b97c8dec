//! What may be said aloud: URLs without secrets, and a server's words cut to size.
//!
//! User names, passwords, presigned queries and tokens never leave through an error or a log, so
//! every URL in this crate's errors is a [`PlainUrl`], and whatever a server wrote goes through
//! [`quote`].

use std::fmt;

use reqwest::Url;
use reqwest::header::HeaderValue;
use serde::Deserialize;

/// How much of an error body is read.
pub const ERROR_BODY_BYTES: usize = 16 << 10;
/// How much of a server's message is repeated.
const QUOTED_CHARS: usize = 300;

/// A URL without user, password, query and fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainUrl(String);

impl From<&Url> for PlainUrl {
    fn from(url: &Url) -> Self {
        let mut plain = format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default());
        if let Some(port) = url.port() {
            plain.push_str(&format!(":{port}"));
        }
        plain.push_str(url.path());
        Self(plain)
    }
}

impl fmt::Display for PlainUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a registry said about a failure, ready to be put at the end of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quote(String);

impl fmt::Display for Quote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

/// distribution-spec, "Error Codes".
#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorItem>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: serde_json::Value,
    #[serde(default)]
    message: serde_json::Value,
}

/// Quotes a registry's error body. Only the fields of the registry error format are repeated; of
/// anything else (an HTML page, say) only the type is named. `sent` is the Authorization header of
/// the request: should the server echo it, it is cut out.
pub fn quote(content_type: Option<&HeaderValue>, body: &[u8], sent: Option<&HeaderValue>) -> Quote {
    if let Ok(body) = serde_json::from_slice::<ErrorBody>(body) {
        let said = body
            .errors
            .iter()
            .take(3)
            .map(|item| match (item.code.as_str(), item.message.as_str()) {
                (Some(code), Some(message)) => format!("{code} ({message})"),
                (Some(code), None) => code.to_owned(),
                (None, message) => message.unwrap_or("unnamed error").to_owned(),
            })
            .collect::<Vec<_>>()
            .join(", ");
        return Quote(said_aloud(&said, sent));
    }
    let kind = content_type.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    match (body.is_empty(), kind) {
        (true, _) => Quote::default(),
        (false, "") => Quote("a body of no stated type".to_owned()),
        (false, kind) => Quote(format!("a body of type {}", said_aloud(kind, sent))),
    }
}

/// `text` on one line, shortened, without the credentials that were `sent` and without the queries
/// of URLs.
pub fn said_aloud(text: &str, sent: Option<&HeaderValue>) -> String {
    let mut text = text.to_owned();
    let sent = sent.and_then(|value| value.to_str().ok()).unwrap_or_default();
    for secret in sent.split(' ').skip(1).filter(|secret| !secret.is_empty()) {
        text = text.replace(secret, "[credentials]");
    }
    let words: Vec<String> = text.split_whitespace().map(without_query).collect();
    let line: String = words.join(" ").chars().filter(|c| !c.is_control()).collect();
    if line.chars().count() <= QUOTED_CHARS {
        return line;
    }
    line.chars().take(QUOTED_CHARS).chain(['…']).collect()
}

fn without_query(word: &str) -> String {
    let Some(scheme) = word.find("://") else { return word.to_owned() };
    let start = scheme + 3;
    let end = word[start..].find(['?', '#']).map_or(word.len(), |at| start + at);
    let authority_end = word[start..end].find('/').map_or(end, |at| start + at);
    let host = word[start..authority_end].rfind('@').map_or(start, |at| start + at + 1);
    format!("{}{}", &word[..start], &word[host..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_lose_their_secrets() {
        for (input, expected) in [
            ("https://a.io/v2/x?X-Amz-Signature=s3cret", "https://a.io/v2/x"),
            ("https://user:s3cret@a.io:8443/v2/#s3cret", "https://a.io:8443/v2/"),
            ("http://[::1]:5000/v2/", "http://[::1]:5000/v2/"),
        ] {
            assert_eq!(PlainUrl::from(&Url::parse(input).unwrap()).to_string(), expected);
        }
    }

    #[test]
    fn quotes_only_registry_errors() {
        let sent = HeaderValue::from_static("Bearer s3cret");
        let html = HeaderValue::from_static("text/html; charset=utf-8");
        for (body, expected) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":1}]}"#,
                ": MANIFEST_UNKNOWN (manifest unknown)",
            ),
            (r#"{"errors":[{"code":"A"},{"message":"b\nc"}]}"#, ": A, b c"),
            (
                r#"{"errors":[{"code":"A","message":"you sent s3cret"}]}"#,
                ": A (you sent [credentials])",
            ),
            (
                r#"{"errors":[{"code":"A","message":"see https://u:p@s3/x?sig=s3cret now"}]}"#,
                ": A (see https://s3/x now)",
            ),
            ("<html>s3cret</html>", ": a body of type text/html"),
            ("", ""),
        ] {
            assert_eq!(quote(Some(&html), body.as_bytes(), Some(&sent)).to_string(), expected);
        }
        let long = format!(r#"{{"errors":[{{"code":"{}"}}]}}"#, "x".repeat(9000));
        assert!(quote(None, long.as_bytes(), None).to_string().chars().count() < 320);
    }
}
