//! `WWW-Authenticate` (RFC 9110 §11.6.1): which ways to authenticate a registry offers. Pure.

/// How much of the header is looked at; the rest is ignored.
const HEADER_BYTES: usize = 16 << 10;
const CHALLENGES: usize = 16;
const PARAMETERS: usize = 32;

/// One way to authenticate, with lower-case scheme and parameter names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    pub scheme: String,
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.parameters.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }
}

/// Parses one header value, which may hold several challenges. What can't be understood is skipped:
/// a challenge that makes no sense is one that can't be used.
pub fn parse(header: &[u8]) -> Vec<Challenge> {
    let mut rest = &header[..header.len().min(HEADER_BYTES)];
    let mut challenges: Vec<Challenge> = Vec::new();
    while !rest.is_empty() {
        rest = skip(rest, |b| is_space(b) || b == b',');
        let (token, after) = split(rest, is_token);
        if token.is_empty() {
            rest = rest.get(1..).unwrap_or_default();
            continue;
        }
        let name = lower(token);
        let after = skip(after, is_space);
        let Some(value) = after.strip_prefix(b"=") else {
            if challenges.len() == CHALLENGES {
                break;
            }
            challenges.push(Challenge { scheme: name, parameters: Vec::new() });
            rest = after;
            continue;
        };
        let (value, after) = self::value(skip(value, is_space));
        rest = after;
        if let Some(challenge) = challenges.last_mut()
            && challenge.parameters.len() < PARAMETERS
        {
            challenge.parameters.push((name, value));
        }
    }
    challenges
}

/// A token or a quoted string, and what follows it.
fn value(input: &[u8]) -> (String, &[u8]) {
    let Some(quoted) = input.strip_prefix(b"\"") else {
        let (token, rest) = split(input, is_token);
        return (String::from_utf8_lossy(token).into_owned(), rest);
    };
    let mut text = Vec::new();
    let mut bytes = quoted.iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return (String::from_utf8_lossy(&text).into_owned(), &quoted[at + 1..]),
            b'\\' => text.extend(bytes.next().map(|(_, escaped)| *escaped)),
            byte => text.push(*byte),
        }
    }
    (String::from_utf8_lossy(&text).into_owned(), &[])
}

fn split(input: &[u8], belongs: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    input.split_at(input.iter().position(|b| !belongs(*b)).unwrap_or(input.len()))
}

fn skip(input: &[u8], belongs: impl Fn(u8) -> bool) -> &[u8] {
    split(input, belongs).1
}

fn is_space(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn lower(token: &[u8]) -> String {
    String::from_utf8_lossy(token).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(header: &str, expected: &[(&str, &[(&str, &str)])]) {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let expected: Vec<Challenge> = expected
            .iter()
            .map(|(scheme, pairs)| Challenge {
                scheme: (*scheme).to_owned(),
                parameters: pairs.iter().map(owned).collect(),
            })
            .collect();
        assert_eq!(parse(header.as_bytes()), expected, "{header}");
    }

    #[test]
    fn parses_challenges() {
        check("", &[]);
        check("Basic", &[("basic", &[])]);
        check(r#"Basic realm="a, b=c""#, &[("basic", &[("realm", "a, b=c")])]);
        check(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
            &[(
                "bearer",
                &[
                    ("realm", "https://auth.docker.io/token"),
                    ("service", "registry.docker.io"),
                    ("scope", "repository:a/b:pull,push"),
                ],
            )],
        );
        check(
            r#"Negotiate, BEARER Realm = "x" , service=y, Basic realm="q\"uote\\d""#,
            &[
                ("negotiate", &[]),
                ("bearer", &[("realm", "x"), ("service", "y")]),
                ("basic", &[("realm", "q\"uote\\d")]),
            ],
        );
        check(r#"Bearer realm="open"#, &[("bearer", &[("realm", "open")])]);
        check(r#"realm="no scheme", Basic"#, &[("basic", &[])]);
        check("Basic realm=\"a\\", &[("basic", &[("realm", "a")])]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_bounded(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let challenges = parse(&bytes);
            prop_assert!(challenges.len() <= CHALLENGES);
            prop_assert!(challenges.iter().all(|c| c.parameters.len() <= PARAMETERS));
        }

        #[test]
        fn damaged_headers_are_bounded(
            flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            times in 1..40_usize,
        ) {
            let one = b"Bearer realm=\"https://a.example/token\",service=\"r\",scope=\"x\\\"y\", Basic realm=r,";
            let mut header = one.repeat(times);
            for (at, byte) in flips {
                let at = at.index(header.len());
                header[at] = byte;
            }
            let challenges = parse(&header);
            prop_assert!(challenges.len() <= CHALLENGES);
            let text = |c: &Challenge| c.parameters.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
            // A byte that isn't UTF-8 becomes a character of three.
            prop_assert!(challenges.iter().map(text).sum::<usize>() <= 3 * header.len());
        }

        #[test]
        fn quoted_values_come_back(value in "[ -~]{0,60}") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"");
            let parsed = parse(format!("Bearer realm=\"{escaped}\", a=b").as_bytes());
            prop_assert_eq!(&parsed[0].parameters[0].1, &value);
            prop_assert_eq!(parsed[0].parameter("a"), Some("b"));
        }
    }
}
