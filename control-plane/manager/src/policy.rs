//! A cluster's policy: the repositories that its nodes may read without the registry being asked.

/// Patterns: a repository with its host, `docker.io/library/debian`, in which `*` may stand at either end for any text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy(Vec<String>);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    #[error("policy has {0} patterns; at most {MAX_PATTERNS} are supported")]
    TooMany(usize),
    #[error(
        "{0:?} isn't a pattern: expected host/repository, with `*` only at its beginning or end"
    )]
    Pattern(String),
}

const MAX_PATTERNS: usize = 1000;
const MAX_LEN: usize = 512;

impl Policy {
    /// Refuses what could never match, so that nobody believes in it.
    pub fn parse(patterns: &[String]) -> Result<Self, Error> {
        if patterns.len() > MAX_PATTERNS {
            return Err(Error::TooMany(patterns.len()));
        }
        match patterns.iter().find(|pattern| !is_pattern(pattern)) {
            Some(wrong) => Err(Error::Pattern(wrong.chars().take(100).collect())),
            None => Ok(Self(patterns.to_vec())),
        }
    }

    /// The pattern by which `name` (`host/repository`) may be read.
    pub fn allows(&self, name: &str) -> Option<&str> {
        self.0.iter().map(String::as_str).find(|pattern| matches(pattern, name))
    }
}

fn is_pattern(pattern: &str) -> bool {
    let inner = pattern.strip_prefix('*').unwrap_or(pattern);
    let inner = inner.strip_suffix('*').unwrap_or(inner);
    let whole = pattern == "*";
    let open = pattern.starts_with('*') || pattern.ends_with('*');
    let legal = |b: u8| b.is_ascii_alphanumeric() || b"./_-:[]".contains(&b);
    pattern.len() <= MAX_LEN
        && (whole || !inner.is_empty() && inner.bytes().all(legal) && (open || inner.contains('/')))
}

fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(""), _) => true,
        (Some(rest), Some(_)) => rest.strip_suffix('*').is_some_and(|inner| name.contains(inner)),
        (Some(end), None) => name.ends_with(end),
        (None, Some(start)) => name.starts_with(start),
        (None, None) => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_allows_what_it_says() {
        for (pattern, name, expected) in [
            ("docker.io/library/debian", "docker.io/library/debian", true),
            ("docker.io/library/debian", "docker.io/library/debian2", false),
            ("docker.io/library/debian", "evil.io/docker.io/library/debian", false),
            ("docker.io/library/*", "docker.io/library/debian", true),
            ("docker.io/library/*", "docker.io/libraries/debian", false),
            ("docker.io/*", "docker.io.evil.com/x", false),
            ("docker.io*", "docker.io.evil.com/x", true),
            ("*/debian", "docker.io/library/debian", true),
            ("*/debian", "docker.io/library/xdebian", false),
            ("*/team/*", "r:5000/team/app", true),
            ("*/team/*", "r:5000/teams/app", false),
            ("*", "a/b", true),
            ("r:5000/a", "r:5000/a", true),
        ] {
            let policy = Policy::parse(&[pattern.to_owned()]).unwrap();
            assert_eq!(policy.allows(name).is_some(), expected, "{pattern} {name}");
        }
        assert_eq!(Policy::default().allows("a/b"), None, "nothing is allowed by default");
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for wrong in ["", "**", "debian", "a/*/b", "a/b c", "a/b\n", "*/*/*"] {
            let error = Policy::parse(&[wrong.to_owned()]);
            assert_eq!(error, Err(Error::Pattern(wrong.to_owned())), "{wrong:?}");
        }
        assert_eq!(Policy::parse(&vec!["a/b".to_owned(); 1001]), Err(Error::TooMany(1001)));
    }
}
