//! What the answer to a ranged request means: which of its body's bytes are ours. Pure.

use std::ops::Range;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap};

/// The part of a response's body that answers the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes to throw away first: the server ignored the range.
    pub skip: u64,
    /// Bytes to use then; never more are read.
    pub take: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("the server answered 206 without a Content-Range that can be read")]
    NoContentRange,
    #[error("the server sent bytes {}-{} when {}-{} were asked for", got.start, got.end, asked.start, asked.end)]
    OtherRange { asked: Range<u64>, got: Range<u64> },
    #[error("the server says that the blob has {got} bytes, its descriptor says {expected}")]
    OtherLength { expected: u64, got: u64 },
    #[error("the server announced a body of {got} bytes for a range of {expected}")]
    OtherBody { expected: u64, got: u64 },
    #[error("the server sent an HTML page instead of the blob")]
    Html,
    #[error("the server encoded the body as {0:?} though no encoding was asked for")]
    Encoded(String),
}

/// Checks the head of a successful response to a request for `asked` of a blob of `blob_len` bytes.
pub fn check(
    asked: &Range<u64>,
    blob_len: u64,
    status: StatusCode,
    headers: &HeaderMap,
) -> Result<Part, Error> {
    let encoding = headers.get(CONTENT_ENCODING).map(|v| String::from_utf8_lossy(v.as_bytes()));
    if let Some(encoding) = encoding.filter(|e| !e.eq_ignore_ascii_case("identity")) {
        return Err(Error::Encoded(encoding.chars().take(40).collect()));
    }
    let length: Option<u64> =
        headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
    if status != StatusCode::PARTIAL_CONTENT {
        return match length {
            Some(got) if got != blob_len && is_html(headers) => Err(Error::Html),
            Some(got) if got != blob_len => Err(Error::OtherLength { expected: blob_len, got }),
            None if is_html(headers) => Err(Error::Html),
            _ => Ok(Part { skip: asked.start, take: asked.end - asked.start }),
        };
    }
    let (got, total) = headers
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(parse)
        .ok_or(Error::NoContentRange)?;
    if let Some(total) = total.filter(|total| *total != blob_len) {
        return Err(Error::OtherLength { expected: blob_len, got: total });
    }
    // A server may send less than was asked for (RFC 9110 §15.3.7); the rest is asked for again.
    if got.start != asked.start || got.end > asked.end {
        return Err(Error::OtherRange { asked: asked.clone(), got });
    }
    let take = got.end - got.start;
    match length {
        Some(length) if length != take => Err(Error::OtherBody { expected: take, got: length }),
        _ => Ok(Part { skip: 0, take }),
    }
}

/// `bytes FIRST-LAST/TOTAL` as a half-open range and the total, `None` for `*`.
fn parse(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (unit, rest) = text.trim().split_once(' ')?;
    let (range, total) = rest.split_once('/')?;
    let (first, last) = range.trim().split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    let total = match total.trim() {
        "*" => None,
        total => Some(number(total)?),
    };
    let sound =
        unit.eq_ignore_ascii_case("bytes") && first <= last && last < total.unwrap_or(u64::MAX);
    sound.then(|| (first..last + 1, total))
}

fn number(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn is_html(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|v| v.as_bytes().to_ascii_lowercase().starts_with(b"text/html"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let header = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        pairs.iter().map(header).collect()
    }

    #[test]
    fn accepts_only_answers_to_the_question() {
        let (asked, len) = (100..200, 1000);
        let part = |skip, take| Ok(Part { skip, take });
        type Row = (u16, Vec<(&'static str, &'static str)>, Result<Part, Error>);
        let rows: Vec<Row> = vec![
            (206, vec![("content-range", "bytes 100-199/1000")], part(0, 100)),
            (
                206,
                vec![("content-range", "bytes 100-199/*"), ("content-length", "100")],
                part(0, 100),
            ),
            (206, vec![("content-range", "bytes 100-149/1000")], part(0, 50)),
            (206, vec![], Err(Error::NoContentRange)),
            (206, vec![("content-range", "bytes 199-100/1000")], Err(Error::NoContentRange)),
            (206, vec![("content-range", "items 100-199/1000")], Err(Error::NoContentRange)),
            (206, vec![("content-range", "bytes +100-199/1000")], Err(Error::NoContentRange)),
            (
                206,
                vec![("content-range", "bytes 100-18446744073709551615/*")],
                Err(Error::NoContentRange),
            ),
            (
                206,
                vec![("content-range", "bytes 0-99/1000")],
                Err(Error::OtherRange { asked: 100..200, got: 0..100 }),
            ),
            (
                206,
                vec![("content-range", "bytes 100-299/1000")],
                Err(Error::OtherRange { asked: 100..200, got: 100..300 }),
            ),
            (
                206,
                vec![("content-range", "bytes 100-199/999")],
                Err(Error::OtherLength { expected: 1000, got: 999 }),
            ),
            (
                206,
                vec![("content-range", "bytes 100-199/1000"), ("content-length", "7")],
                Err(Error::OtherBody { expected: 100, got: 7 }),
            ),
            (200, vec![("content-length", "1000")], part(100, 100)),
            (200, vec![], part(100, 100)),
            (
                200,
                vec![("content-length", "7")],
                Err(Error::OtherLength { expected: 1000, got: 7 }),
            ),
            (200, vec![("content-type", "text/html; charset=utf-8")], Err(Error::Html)),
            (200, vec![("content-type", "text/html"), ("content-length", "1000")], part(100, 100)),
            (200, vec![("content-encoding", "gzip")], Err(Error::Encoded("gzip".to_owned()))),
        ];
        for (status, pairs, expected) in rows {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                check(&asked, len, status, &headers(&pairs)),
                expected,
                "{status} {pairs:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_header_yields_bytes_outside_the_range(value: String, start in 0u64..500, len in 1u64..500, partial: bool) {
            let mut map = HeaderMap::new();
            for value in [value, format!("bytes {start}-{}/1000", start + len)] {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    map.insert(CONTENT_RANGE, value.clone());
                    map.insert(CONTENT_LENGTH, value);
                }
                let status = if partial { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
                if let Ok(part) = check(&(start..start + len), 1000, status, &map) {
                    prop_assert!(part.take <= len && part.skip <= start);
                }
            }
        }
    }
}
