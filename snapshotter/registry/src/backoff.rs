//! How long to wait before asking again. Pure: time and randomness are arguments.

use std::time::{Duration, SystemTime};

use reqwest::header::HeaderValue;

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);

/// The pause before try `attempt` (the first repetition is 1): doubling from 200 ms to 10 s, of which
/// the upper half is random so that nodes don't come back all at once.
pub fn pause(attempt: u32, random: u64) -> Duration {
    let doublings = attempt.saturating_sub(1).min(16);
    let full = FIRST.saturating_mul(1 << doublings).min(LONGEST);
    let half = full / 2;
    let part = u32::try_from(random % 1024).unwrap_or_default();
    half + half * part / 1024
}

/// The pause that a `Retry-After` header asks for (RFC 9110 §10.2.3: seconds or a date).
pub fn retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::from(u32::MAX))));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_seconds_and_dates() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (input, expected) in [
            ("0", Some(0)),
            (" 120 ", Some(120)),
            ("99999999999999999999999", Some(u64::from(u32::MAX))),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("", None),
            ("-1", None),
            ("soon", None),
        ] {
            let value = HeaderValue::from_str(input).unwrap();
            assert_eq!(retry_after(&value, now), expected.map(Duration::from_secs), "{input:?}");
        }
    }

    #[test]
    fn pauses_grow_to_a_limit() {
        assert_eq!(pause(1, 0), Duration::from_millis(100));
        assert!(pause(1, 1023) < Duration::from_millis(200));
        assert_eq!(pause(3, 0), Duration::from_millis(400));
        assert_eq!(pause(u32::MAX, 0), LONGEST / 2);
    }

    proptest! {
        #[test]
        fn any_header_and_attempt_is_fine(bytes: Vec<u8>, attempt: u32, random: u64) {
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                retry_after(&value, SystemTime::UNIX_EPOCH);
            }
            prop_assert!(pause(attempt, random) <= LONGEST);
        }
    }
}
