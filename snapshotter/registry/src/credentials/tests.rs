//! Credentials from docker's config.json and its helpers, as people have them on disk.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use proptest::prelude::*;

use super::*;

fn password(username: &str, secret: &str) -> Option<Credential> {
    Some(Credential::Password { username: username.to_owned(), secret: secret.to_owned() })
}

#[test]
fn finds_the_entry_that_fits_best() {
    let text = r#"{"auths": {
        "https://index.docker.io/v1/": {"auth": "aHViOnMzY3JldA=="},
        "ghcr.io": {"auth": "Z2g6YTpi"},
        "ghcr.io/org": {"username": "org", "password": "p"},
        "https://r.example:5000": {"identitytoken": "id"},
        "t.example": {"registrytoken": "bearer"},
        "u.example": {"auth": "PHRva2VuPjppZA"},
        "empty.example": {}
    }}"#;
    let file = file::parse(text.as_bytes(), "config.json").unwrap();
    for (host, repository, expected) in [
        ("docker.io", "library/debian", password("hub", "s3cret")),
        ("ghcr.io", "a/b", password("gh", "a:b")),
        ("ghcr.io", "org/b", password("org", "p")),
        ("ghcr.io", "organ/b", password("gh", "a:b")),
        ("r.example:5000", "a", Some(Credential::Identity("id".to_owned()))),
        ("r.example", "a", None),
        ("t.example", "a", Some(Credential::Bearer("bearer".to_owned()))),
        ("u.example", "a", Some(Credential::Identity("id".to_owned()))),
        ("empty.example", "a", None),
        ("other.example", "a", None),
    ] {
        assert!(file.find(host, repository).cloned() == expected, "{host}/{repository}");
    }
}

#[test]
fn a_wrong_file_is_named_without_its_secrets() {
    for (text, words) in [
        ("{\n\"auths\": {\"a\": {\"auth\": \"s3cret!\"}}}", "auths.\"a\".auth is not the base64"),
        ("{\n\"auths\": \"s3cret\"}", "/c.json, line 2"),
        ("{\n", "not docker's config.json"),
    ] {
        let error = file::parse(text.as_bytes(), "/c.json").err().unwrap().to_string();
        assert!(error.contains(words) && !error.contains("s3cret"), "{error}");
    }
    assert!(!format!("{:?}", password("user", "s3cret")).contains("s3cret"));
}

#[test]
fn the_hosts_helper_goes_before_the_store() {
    let text = br#"{"credHelpers": {"https://a.io": "own"}, "credsStore": "all"}"#;
    let file = file::parse(text, "config.json").unwrap();
    assert_eq!(file.helper("a.io"), Some("own"));
    assert_eq!(file.helper("b.io"), Some("all"));
    assert_eq!(file::parse(b"{\"credsStore\": \"\"}", "").unwrap().helper("b.io"), None);
}

#[tokio::test]
async fn a_changed_file_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let credentials = Docker::new(Some(path.clone()));
    assert!(credentials.find("a.io", "x", false).await.unwrap().is_none());
    let before = credentials.version();
    fs::write(&path, r#"{"auths": {"a.io": {"username": "u", "password": "p"}}}"#).unwrap();
    assert!(credentials.version() != before);
    assert!(credentials.find("a.io", "x", false).await.unwrap() == password("u", "p"));
}

#[tokio::test]
async fn helpers_are_bounded_and_their_names_checked() {
    for name in ["../x", "a b", "a;b", ""] {
        assert!(
            matches!(helper::get(name, "a.io", "/bin".as_ref()).await, Err(HelperError::Name(_))),
            "{name}"
        );
    }
    let error =
        helper::get("skimmer-test-does-not-exist", "a.io", "/bin".as_ref()).await.unwrap_err();
    assert!(matches!(error, HelperError::Run { .. }), "{error}");
}

/// What looks in a config.json of `text`, in `folder`, and finds `docker-credential-skimmertest` there.
fn with_helper(folder: &Path, script: &str, text: &str) -> Docker {
    let (program, config) =
        (folder.join("docker-credential-skimmertest"), folder.join("config.json"));
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(&config, text).unwrap();
    let mut credentials = Docker::new(Some(config));
    credentials.programs = format!("{}:/usr/bin:/bin", folder.display()).into();
    credentials
}

#[tokio::test]
async fn helpers_answer() {
    let folder = tempfile::tempdir().unwrap();
    let credentials = with_helper(
        folder.path(),
        "#!/bin/sh\nread -r server\ncase $server in\n\
         a.io) echo '{\"ServerURL\":\"a.io\",\"Username\":\"u\",\"Secret\":\"p\"}';;\n\
         t.io) echo '{\"Username\":\"<token>\",\"Secret\":\"id\"}';;\n\
         https://index.docker.io/v1/) echo '{\"Username\":\"hub\",\"Secret\":\"p\"}';;\n\
         n.io) echo 'credentials not found in native keychain'; exit 1;;\n\
         b.io) echo hello;;\n\
         *) exit 1;; esac\n",
        r#"{"credsStore": "skimmertest", "auths": {"n.io": {"username": "f", "password": "p"}}}"#,
    );
    let find = async |host| credentials.find(host, "x", false).await;
    assert!(find("a.io").await.unwrap() == password("u", "p"));
    assert!(find("t.io").await.unwrap() == Some(Credential::Identity("id".to_owned())));
    assert!(find("docker.io").await.unwrap() == password("hub", "p"));
    assert!(find("n.io").await.unwrap() == password("f", "p"));
    assert!(matches!(find("b.io").await, Err(Error::Helper(HelperError::Answer { .. }))));
    assert!(matches!(find("x.io").await, Err(Error::Helper(HelperError::Failed { .. }))));
}

/// What a helper gave is good for a while, but not once it was refused; that it gave nothing isn't.
#[tokio::test]
async fn a_helper_whose_answer_changes_is_asked_again() {
    for text in [r#"{"credHelpers": {"a.io": "skimmertest"}}"#, r#"{"credsStore": "skimmertest"}"#]
    {
        let folder = tempfile::tempdir().unwrap();
        let answer = folder.path().join("answer");
        let script = format!("#!/bin/sh\ncat >/dev/null\ncat '{}'\n", answer.display());
        let credentials = with_helper(folder.path(), &script, text);
        let says = |secret: &str| {
            fs::write(&answer, format!(r#"{{"Username": "u", "Secret": "{secret}"}}"#)).unwrap();
        };
        let find = async |again| credentials.find("a.io", "x", again).await.unwrap();
        says("old");
        assert!(find(false).await == password("u", "old"), "{text}");
        says("new");
        assert!(find(false).await == password("u", "old"), "{text}");
        assert!(find(true).await == password("u", "new"), "{text}");
        assert!(find(false).await == password("u", "new"), "{text}");
        says("");
        assert!(find(true).await.is_none(), "{text}");
        says("newest");
        assert!(find(false).await == password("u", "newest"), "{text}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes: Vec<u8>, value in "[ -~]{0,40}") {
        let _ = file::parse(&bytes, "config.json");
        let text = serde_json::json!({"auths": {value.clone(): {"auth": value}}}).to_string();
        let _ = file::parse(text.as_bytes(), "config.json");
    }
}
