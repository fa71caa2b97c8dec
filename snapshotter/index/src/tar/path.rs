//! Paths of archives: bytes, not text, and never trusted.

/// Resolves `.`, `..` and repeated slashes as if the path started at the root, so that nothing
/// leads above it; the result has no slash at either end. Empty: the root itself.
pub fn clean(path: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => out.truncate(out.iter().rposition(|b| *b == b'/').unwrap_or(0)),
            name => {
                if !out.is_empty() {
                    out.push(b'/');
                }
                out.extend_from_slice(name);
            }
        }
    }
    out
}

/// A path for a message: what isn't UTF-8 is replaced, the root is `/`.
pub fn display(path: &[u8]) -> String {
    match path {
        b"" => "/".to_owned(),
        path => String::from_utf8_lossy(path).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::clean;

    #[test]
    fn paths_are_resolved_below_the_root() {
        for (path, want) in [
            ("", ""),
            (".", ""),
            ("./", ""),
            ("/", ""),
            ("..", ""),
            ("../../etc/passwd", "etc/passwd"),
            ("/abs/path", "abs/path"),
            ("./a/b", "a/b"),
            ("a//b/./c/", "a/b/c"),
            ("a/../b", "b"),
            ("a/../../b", "b"),
            ("a/b/..", "a"),
            ("...", "..."),
            ("a/..b", "a/..b"),
        ] {
            assert_eq!(clean(path.as_bytes()), want.as_bytes(), "{path:?}");
        }
    }
}
