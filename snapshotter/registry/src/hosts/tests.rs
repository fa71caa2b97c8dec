//! hosts.toml as containerd documents it, and as nobody should write it.

use std::fs;

use proptest::prelude::*;

use super::*;

/// `base`, pull, resolve, skip_verify, namespace of each endpoint.
type Row<'a> = (&'a str, bool, bool, bool, Option<&'a str>);

fn check(host: &str, text: &str, expected: &[Row<'_>]) {
    let parsed = file::parse(text, Path::new("/etc/hosts.toml"), host).unwrap();
    let got: Vec<Row<'_>> = parsed
        .iter()
        .map(|p| {
            (p.base.as_str(), p.can_pull, p.can_resolve, p.skip_verify, p.namespace.as_deref())
        })
        .collect();
    assert_eq!(got, expected, "{host}: {text}");
}

#[test]
fn defaults_are_containerds() {
    for (host, base, skip_verify) in [
        ("docker.io", "https://registry-1.docker.io/v2", false),
        ("ghcr.io", "https://ghcr.io/v2", false),
        ("registry.example:5000", "https://registry.example:5000/v2", false),
        ("localhost:5000", "http://localhost:5000/v2", false),
        ("127.0.0.1:80", "http://127.0.0.1/v2", false),
        ("[::1]:5000", "http://[::1]:5000/v2", false),
        ("localhost", "https://localhost/v2", true),
        ("localhost:443", "https://localhost/v2", true),
    ] {
        check(host, "", &[(base, true, true, skip_verify, None)]);
    }
}

#[test]
fn keeps_the_order_of_the_file() {
    let text = r#"
        server = "https://registry-1.docker.io"
        [host."https://z.example"]
          capabilities = ["pull", "resolve"]
        [host."http://a.example:5000/prefix"]
          capabilities = ["pull"]
          skip_verify = true
        [host."m.example/v2/proxy"]
          override_path = true
    "#;
    let of = Some("docker.io");
    check(
        "docker.io",
        text,
        &[
            ("https://z.example/v2", true, true, false, of),
            ("http://a.example:5000/prefix/v2", true, false, true, of),
            ("https://m.example/v2/proxy", true, true, false, of),
            ("https://registry-1.docker.io/v2", true, true, false, None),
        ],
    );
    check(
        "a.example",
        "server = \"http://a.example:8080/v2/\"",
        &[("http://a.example:8080/v2", true, true, false, Some("a.example"))],
    );
    check(
        "a.example:5000",
        "server = \"http://a.example:5000\"",
        &[("http://a.example:5000/v2", true, true, false, None)],
    );
}

#[test]
fn reads_certificates_and_headers() {
    let folder = tempfile::tempdir().unwrap();
    let roots = [folder.path().to_owned()];
    let host = folder.path().join("r.example_5000_");
    fs::create_dir(&host).unwrap();
    for name in ["a.pem", "b.pem", "both.pem", "c.cert", "c.key"] {
        fs::write(host.join(name), name).unwrap();
    }
    let text = "ca = \"a.pem\"\n[host.\"https://m\"]\nca = [\"a.pem\", \"b.pem\"]\n\
         client = [[\"c.cert\", \"c.key\"], \"both.pem\", [\"both.pem\", \"\"]]\n\
         [host.\"https://m\".header]\nx-one = \"1\"\nx-two = [\"2\", \"3\"]\n";
    fs::write(host.join("hosts.toml"), text).unwrap();
    let endpoints = load(&roots, "r.example:5000").unwrap();
    let pair = |a: &str, b: &str| (a.as_bytes().to_vec(), b.as_bytes().to_vec());
    let both = pair("both.pem", "both.pem");
    assert_eq!(endpoints[0].tls.authorities, [b"a.pem".to_vec(), b"b.pem".to_vec()]);
    assert_eq!(endpoints[0].tls.clients, [pair("c.cert", "c.key"), both.clone(), both]);
    let values: Vec<_> = endpoints[0].headers.get_all("x-two").iter().collect();
    assert_eq!(values, ["2", "3"]);
    assert_eq!(endpoints[1].tls.authorities, [b"a.pem".to_vec()]);

    // A folder without hosts.toml, as Docker has them; and the one for all other hosts.
    let default = folder.path().join("_default");
    fs::create_dir(&default).unwrap();
    fs::write(default.join("ca.crt"), "ca").unwrap();
    for (host, base) in [
        ("other.example", "https://other.example/v2"),
        ("localhost:5000", "https://localhost:5000/v2"),
    ] {
        let endpoints = load(&roots, host).unwrap();
        assert_eq!(endpoints[0].tls.authorities, [b"ca".to_vec()]);
        assert_eq!(endpoints[0].base.as_str(), base);
    }
}

#[test]
fn a_wrong_file_is_named_with_key_and_remedy() {
    for (text, words) in [
        ("server = [", vec!["/etc/hosts.toml, line 1", "not TOML"]),
        ("\n\n[host.\"a\"]\nheader = { x = s3cret", vec!["line 4"]),
        ("server = 1", vec!["key server: is not a string", "https://"]),
        ("server = \"ftp://x\"", vec!["key server: is neither http nor https"]),
        ("server = \"https://u:s3cret@x\"", vec!["holds a user or a password", "config.json"]),
        ("host = 1", vec!["key host: is not a table"]),
        ("[host]\na = 1", vec!["key host.\"a\": is not a table"]),
        (
            "[host.a]\ncapabilities = [\"fetch\"]",
            vec!["host.\"a\".capabilities: holds", "\"pull\""],
        ),
        ("[host.a]\nskip_verify = \"yes\"", vec!["host.\"a\".skip_verify: is not a boolean"]),
        ("ca = 1", vec!["key ca: is no file name"]),
        ("client = [[\"a\", \"b\", \"c\"]]", vec!["key client"]),
        ("[header]\n\"a b\" = \"s3cret\"", vec!["header.\"a b\": is no header"]),
        ("[header]\na = \"s3cret\\n\"", vec!["header.\"a\": is no header"]),
    ] {
        let error =
            file::parse(text, Path::new("/etc/hosts.toml"), "r.io").unwrap_err().to_string();
        assert!(error.contains("/etc/hosts.toml") && !error.contains("s3cret"), "{error}");
        for word in words {
            assert!(error.contains(word), "{error}: {word}");
        }
    }
}

#[test]
fn a_missing_certificate_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let host = folder.path().join("r.io");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("hosts.toml"), "ca = \"missing.pem\"").unwrap();
    let error = load(&[folder.path().to_owned()], "r.io").err().unwrap().to_string();
    assert!(error.contains("missing.pem"), "{error}");
}

#[test]
fn a_name_that_is_a_path_is_refused() {
    for host in ["", "..", "../x", "a/b", "a..b", ".hidden", "a b", "a?b", "a@b", "_default"] {
        assert!(matches!(load(&[PathBuf::from("/")], host), Err(Error::Host(_))), "{host}");
    }
}

/// A file with every key.
const WHOLE: &str = r#"
server = "https://upstream.example"
[host."https://mirror.example:5000/v2/proxy"]
capabilities = ["pull", "resolve", "push"]
ca = ["/a.pem", "/b.pem"]
client = [["/c.pem", "/c.key"], "/d.pem"]
skip_verify = true
override_path = true
[host."https://mirror.example:5000/v2/proxy".header]
x-one = "1"
x-many = ["a", "b"]
[host."http://second.example"]
capabilities = ["pull"]
"#;

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused(text in ".{0,400}", host in "[a-z0-9.:\\[\\]-]{0,30}") {
        if let Ok(parsed) = file::parse(&text, Path::new("hosts.toml"), &host) {
            prop_assert!(!parsed.is_empty());
        }
    }

    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let text = String::from_utf8_lossy(&bytes);
        let _ = file::parse(&text, Path::new("hosts.toml"), "r.io");
    }

    #[test]
    fn damaged_files_are_parsed_or_refused(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = WHOLE.as_bytes().to_vec();
        prop_assert!(file::parse(WHOLE, Path::new("hosts.toml"), "r.io").is_ok());
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for text in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            let text = String::from_utf8_lossy(text);
            if let Ok(parsed) = file::parse(&text, Path::new("hosts.toml"), "r.io") {
                prop_assert!(!parsed.is_empty() && parsed.len() <= 4);
            }
        }
    }

    #[test]
    fn any_values_are_parsed_or_refused(
        key in "(server|ca|client|capabilities|skip_verify|header|override_path|host)",
        value in "([0-9]|true|\"[ -!#-\\[\\]-~]{0,20}\"|\\[\"[a-z:/]{0,9}\"\\]|\\{ \"[a-z :/]{0,9}\" = [0-9] \\})",
        nested: bool,
    ) {
        let at = if nested { "[host.\"http://m\"]\n" } else { "" };
        let _ = file::parse(&format!("{at}{key} = {value}\n"), Path::new("hosts.toml"), "r.io");
    }
}
