//! Which images a pattern of kubelet's is for. Pure.
//!
//! As in Kubernetes' documentation of `matchImages`: the pattern's host has as many parts as the image's, each of which
//! it matches (`*`, `?` and `[a-z]` within a part); its port is the image's; its path is a prefix of the image's.

/// Whether `pattern` is for `image`, which is `host[:port]/path`.
pub fn matches(pattern: &str, image: &str) -> bool {
    let (pattern, image) = (split(pattern), split(image));
    let parts = || pattern.host.split('.').zip(image.host.split('.'));
    pattern.host.split('.').count() == image.host.split('.').count()
        && parts().all(|(pattern, part)| glob(pattern.as_bytes(), part.as_bytes()))
        && pattern.port == image.port
        && image.path.starts_with(pattern.path)
}

struct Place<'a> {
    host: &'a str,
    port: &'a str,
    path: &'a str,
}

fn split(text: &str) -> Place<'_> {
    let bare = text.trim_start_matches("https://").trim_start_matches("http://");
    let (authority, path) = bare.split_at(bare.find('/').unwrap_or(bare.len()));
    let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
    Place { host, port, path: path.trim_end_matches('/') }
}

/// Whether all of `text` fits `pattern`. Time O(pattern × text).
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where the last `*` was, and what it has been taken for.
    let mut star: Option<(usize, usize)> = None;
    loop {
        let fits = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            None if t == text.len() => return true,
            None => None,
            Some(_) => text.get(t).and_then(|byte| one(&pattern[p..], *byte)),
        };
        match (fits, star) {
            (Some(len), _) => (p, t) = (p + len, t + 1),
            (None, Some((after, taken))) if taken < text.len() => {
                star = Some((after, taken + 1));
                (p, t) = (after, taken + 1);
            }
            (None, _) => return false,
        }
    }
}

/// The length of the pattern's first element, if `byte` fits it.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern[0] {
        b'?' => Some(1),
        b'[' => {
            let end = pattern.iter().skip(2).position(|b| *b == b']')? + 2;
            let class = &pattern[1..end];
            let (class, negated) = match class.strip_prefix(b"^") {
                Some(rest) => (rest, true),
                None => (class, false),
            };
            let mut rest = class;
            let mut inside = false;
            while let Some(low) = rest.first() {
                if let [_, b'-', high, ..] = rest {
                    inside |= (*low..=*high).contains(&byte);
                    rest = &rest[3..];
                } else {
                    inside |= *low == byte;
                    rest = &rest[1..];
                }
            }
            (inside != negated).then_some(end + 1)
        }
        other => (other == byte).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, proptest};

    #[test]
    fn patterns_are_for_images_as_kubernetes_documents() {
        for (pattern, image, expected) in [
            (
                "123456789.dkr.ecr.us-east-1.amazonaws.com",
                "123456789.dkr.ecr.us-east-1.amazonaws.com/a",
                true,
            ),
            ("*.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/a/b", true),
            ("*.azurecr.io", "team.azurecr.io/app", true),
            ("*.azurecr.io", "azurecr.io/app", false),
            ("*.azurecr.io", "a.team.azurecr.io/app", false),
            ("*.*.azurecr.io", "a.team.azurecr.io/app", true),
            ("gcr.io", "gcr.io/project/app", true),
            ("gcr.io", "eu.gcr.io/project/app", false),
            ("registry.io:8080/path", "registry.io:8080/path/app", true),
            ("registry.io:8080/path", "registry.io:8080/other/app", false),
            ("registry.io:8080/path", "registry.io/path/app", false),
            ("registry.io", "registry.io:8080/app", false),
            ("*.registry.io:8080/path", "a.registry.io:8080/path", true),
            ("r?gistry.io", "registry.io/app", true),
            ("r[a-f]gistry.io", "registry.io/app", true),
            ("r[^a-f]gistry.io", "registry.io/app", false),
            ("eu-*", "eu-west/app", true),
            ("app*.k8s.io", "app1.k8s.io/x", true),
            ("*", "localhost:5000/x", false),
            ("*:5000", "localhost:5000/x", true),
            ("https://gcr.io/", "gcr.io/x", true),
            ("r[", "r[/x", false),
        ] {
            assert_eq!(matches(pattern, image), expected, "{pattern} {image}");
        }
    }

    proptest! {
        #[test]
        fn any_pattern_is_tried(pattern in any::<String>(), image in any::<String>()) {
            let _ = matches(&pattern, &image);
            let _ = glob(pattern.as_bytes(), image.as_bytes());
        }
    }
}
