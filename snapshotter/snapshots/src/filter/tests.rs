//! The filter language, row by row, and on arbitrary text.

use std::time::SystemTime;

use proptest::prelude::*;

use super::{Filter, Lookup};
use crate::{Kind, Snapshot};

fn subject() -> Snapshot {
    let labels = [
        ("l", "1"),
        ("a.b", "x y"),
        ("containerd.io/snapshot.ref", "sha256:ab"),
        ("uni", "é\u{1F600}"),
    ];
    Snapshot {
        id: 1,
        name: "default/12/extract-1 sha256:ab".to_owned(),
        parent: "p".to_owned(),
        kind: Kind::Committed,
        created: SystemTime::UNIX_EPOCH,
        updated: SystemTime::UNIX_EPOCH,
        labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        layer: None,
        lost: Vec::new(),
    }
}

#[test]
fn matches_as_containerd_does() {
    for (filter, expected) in [
        ("", true),
        ("name", true),
        ("kind==committed", true),
        ("kind==active", false),
        ("kind!=active", true),
        ("parent==p", true),
        ("parent==\"p\"", true),
        ("parent!=\"\"", true),
        ("parent==\"\"", false),
        ("labels.l", true),
        ("labels.m", false),
        ("labels.l==1", true),
        ("labels.l!=1", false),
        ("labels.m!=1", true),
        ("labels.m!=\"\"", false),
        ("labels.m~=\".*\"", true),
        ("labels.a.b==\"x y\"", true),
        ("labels.\"a.b\"==\"x y\"", true),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"p\"", true),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"q\"", false),
        ("name==\"default/12/extract-1 sha256:ab\"", true),
        ("name~=\"^default/[0-9]+/\"", true),
        ("name~=/^default.*ab$/", true),
        ("name~=|extract-\\\\d|", true),
        ("name~=/^x/", false),
        ("name~=\"(\"", false),
        ("kind == committed, parent == p", true),
        ("labels.uni==\"\\u00e9\\U0001f600\"", true),
        ("labels.uni==\"\\xc3\\xa9\\360\\237\\230\\200\"", true),
        ("nothing==x", false),
        ("nothing!=x", true),
        ("nothing", false),
        ("name.more==\"default/12/extract-1 sha256:ab\"", true),
    ] {
        let parsed = Filter::parse(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
        assert_eq!(parsed.matches(&subject()), expected, "{filter}");
    }
}

#[test]
fn refuses_what_containerd_refuses() {
    for filter in [
        ",",
        "name==",
        "name=x",
        "name===x",
        "name<x",
        "name==/x",
        "name==|x|",
        "name==a b",
        "name==a,",
        ".name",
        "name.",
        "labels.\"a",
        "labels./a/==b",
        "name==\"a",
        "name==\"\\q\"",
        "name==\"\\x1\"",
        "name==\"\\400\"",
        "name==\"\\ud800\"",
        "name==.x",
        "name == a ,x",
        "na-me==x",
    ] {
        assert!(Filter::parse(filter).is_err(), "{filter}");
    }
}

#[test]
fn takes_the_narrowest_lookup() {
    let claim = Lookup::Claim { reference: "sha256:ab".to_owned(), parent: "p".to_owned() };
    let top = Lookup::Claim { reference: "sha256:ab".to_owned(), parent: String::new() };
    for (filter, expected) in [
        ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"p\"", claim),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\"", top),
        ("parent==p", Lookup::Children("p".to_owned())),
        ("parent==\"\"", Lookup::Everything),
        ("parent==p,name==n", Lookup::Name("n".to_owned())),
        ("parent!=p", Lookup::Everything),
        ("labels.\"containerd.io/snapshot.ref\"==sha256:ab", Lookup::Everything),
        ("", Lookup::Everything),
    ] {
        assert_eq!(Filter::parse(filter).unwrap().lookup(), expected, "{filter}");
    }
}

/// Go's `%q`, as containerd writes filters.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

proptest! {
    #[test]
    fn never_panics(text in "\\PC*|[a-z.,=~!\"\\\\/|x0-9 ]*") {
        if let Ok(filter) = Filter::parse(&text) {
            filter.matches(&subject());
            filter.lookup();
        }
    }

    #[test]
    fn finds_any_name_and_label_that_is_quoted(name in ".{1,20}", key in ".{1,10}", value in ".{1,20}") {
        let mut snapshot = subject();
        snapshot.name.clone_from(&name);
        snapshot.labels.insert(key.clone(), value.clone());
        let filter = format!("name=={},labels.{}=={}", quoted(&name), quoted(&key), quoted(&value));
        let filter = Filter::parse(&filter).unwrap();
        prop_assert!(filter.matches(&snapshot));
        prop_assert_eq!(filter.lookup(), Lookup::Name(name));
    }
}
