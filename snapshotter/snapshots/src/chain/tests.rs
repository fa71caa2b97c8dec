//! The rules, case by case, and under arbitrary sequences of requests.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::SystemTime;

use proptest::prelude::*;

use super::{Error, New, commit, create, mountable, parents, remove, update};
use crate::records::{Change, Memory, Records};
use crate::{Kind, Labels, Snapshot};

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

fn add(records: &Memory, kind: Kind, name: &str, parent: &str) -> Result<(), Error> {
    let (name, parent) = (name.to_owned(), parent.to_owned());
    let new = New { name, parent, kind, labels: Labels::new(), layer: None };
    Ok(records.apply(&Change::Create(create(records, NOW, new)?))?)
}

fn finish(records: &Memory, name: &str, key: &str, parent: &str) -> Result<(), Error> {
    Ok(records.apply(&commit(records, NOW, name, key, Labels::new(), parent)?)?)
}

/// Committed `base`, `top` on it; active `work` and view `look` on `top`; active `lone`.
fn records() -> Memory {
    let records = Memory::default();
    add(&records, Kind::Active, "a", "").unwrap();
    finish(&records, "base", "a", "").unwrap();
    add(&records, Kind::Active, "b", "base").unwrap();
    finish(&records, "top", "b", "").unwrap();
    add(&records, Kind::Active, "work", "top").unwrap();
    add(&records, Kind::View, "look", "top").unwrap();
    add(&records, Kind::Active, "lone", "").unwrap();
    records
}

#[test]
fn creates_on_committed_parents_only() {
    let records = records();
    let check = |name: &str, parent: &str, wanted: fn(&Error) -> bool| {
        let error = add(&records, Kind::Active, name, parent).unwrap_err();
        assert!(wanted(&error), "{name} on {parent}: {error}");
    };
    check("new", "missing", |e| matches!(e, Error::NoParent(_)));
    check("new", "work", |e| matches!(e, Error::ParentNotCommitted(_)));
    check("new", "look", |e| matches!(e, Error::ParentNotCommitted(_)));
    check("work", "top", |e| matches!(e, Error::Exists(_)));
    check("base", "", |e| matches!(e, Error::Exists(_)));
    check("", "", |e| matches!(e, Error::NoName));
    add(&records, Kind::View, "new", "base").unwrap();
}

#[test]
fn commits_active_snapshots_only() {
    let records = records();
    let check = |name: &str, key: &str, parent: &str, wanted: fn(&Error) -> bool| {
        let error = finish(&records, name, key, parent).unwrap_err();
        assert!(wanted(&error), "{key} as {name} on {parent}: {error}");
    };
    check("base", "work", "", |e| matches!(e, Error::Exists(_)));
    check("new", "missing", "", |e| matches!(e, Error::NotFound(_)));
    check("new", "look", "", |e| matches!(e, Error::NotActive(_)));
    check("new", "top", "", |e| matches!(e, Error::NotActive(_)));
    check("new", "work", "base", |e| matches!(e, Error::OtherParent { .. }));
    check("new", "lone", "missing", |e| matches!(e, Error::NoParent(_)));
    check("new", "lone", "work", |e| matches!(e, Error::RebaseOnUncommitted(_)));
    finish(&records, "rebased", "lone", "top").unwrap();
    assert_eq!(records.get("rebased").unwrap().unwrap().parent, "top");
    finish(&records, "same parent", "work", "top").unwrap();
    assert_eq!(records.get("work").unwrap(), None);
}

#[test]
fn removes_what_nobody_builds_on() {
    let records = records();
    assert!(matches!(remove(&records, "top"), Err(Error::HasChildren(_))));
    assert!(matches!(remove(&records, "missing"), Err(Error::NotFound(_))));
    for name in ["work", "look", "top", "base"] {
        records.apply(&remove(&records, name).unwrap()).unwrap();
    }
}

#[test]
fn updates_labels_only() {
    let records = records();
    let labels = |pairs: &[(&str, &str)]| -> Labels {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    };
    let check = |given: &[(&str, &str)], fields: &[&str], expected: &[(&str, &str)]| {
        let fields: Vec<_> = fields.iter().map(|field| (*field).to_owned()).collect();
        let change = update(&records, NOW, "top", &labels(given), &fields).unwrap();
        records.apply(&change).unwrap();
        assert_eq!(records.get("top").unwrap().unwrap().labels, labels(expected));
    };
    check(&[("a", "1"), ("b.c", "2"), ("empty", "")], &[], &[("a", "1"), ("b.c", "2")]);
    check(&[("a", "3"), ("d", "4")], &["labels.a", "labels.b.c"], &[("a", "3")]);
    check(&[("e", "5")], &["labels"], &[("e", "5")]);
    let error = update(&records, NOW, "top", &Labels::new(), &["parent".to_owned()]).unwrap_err();
    assert!(matches!(error, Error::Immutable { .. }), "{error}");
}

#[test]
fn follows_the_chain_nearest_first() {
    let records = records();
    let names = |chain: Vec<Snapshot>| chain.into_iter().map(|s| s.name).collect::<Vec<_>>();
    assert_eq!(names(mountable(&records, "work").unwrap().1), ["top", "base"]);
    assert_eq!(names(parents(&records, "").unwrap()), [""; 0]);
    assert!(matches!(mountable(&records, "top"), Err(Error::Committed(_))));
    // A circle can't be made by requests; a damaged database shall not hang us.
    let base = records.get("base").unwrap().unwrap();
    let new = Snapshot { parent: "top".to_owned(), ..base.clone() };
    records.apply(&Change::Replace { old: base, new }).unwrap();
    assert!(matches!(mountable(&records, "work"), Err(Error::TooLong(_))));
}

#[derive(Clone, Debug)]
enum Step {
    Create(bool, u8, u8),
    Commit(u8, u8, u8),
    Remove(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let name = || 0u8..6;
    let step = prop_oneof![
        (any::<bool>(), name(), 0u8..7).prop_map(|(view, n, p)| Step::Create(view, n, p)),
        (name(), name(), 0u8..7).prop_map(|(n, k, p)| Step::Commit(n, k, p)),
        name().prop_map(Step::Remove),
    ];
    proptest::collection::vec(step, 0..60)
}

/// Name 6 stands for none.
fn name(n: u8) -> String {
    if n == 6 { String::new() } else { n.to_string() }
}

proptest! {
    #[test]
    fn chains_stay_whole(steps in steps()) {
        let records = Memory::default();
        for step in steps {
            // Refusals are fine; what is granted must keep the chains whole.
            let _granted = match step {
                Step::Create(view, n, p) => {
                    let kind = if view { Kind::View } else { Kind::Active };
                    add(&records, kind, &name(n), &name(p)).is_ok()
                }
                Step::Commit(n, k, p) => finish(&records, &name(n), &name(k), &name(p)).is_ok(),
                Step::Remove(n) => match remove(&records, &name(n)) {
                    Ok(change) => records.apply(&change).is_ok(),
                    Err(_) => false,
                },
            };
            let mut all = BTreeMap::new();
            records.visit(&mut |snapshot| {
                all.insert(snapshot.name.clone(), snapshot);
                ControlFlow::Continue(())
            }).unwrap();
            let mut ids: Vec<_> = all.values().map(|snapshot| snapshot.id).collect();
            ids.sort_unstable();
            ids.dedup();
            prop_assert_eq!(ids.len(), all.len(), "ids are unique");
            for snapshot in all.values() {
                if let Some(parent) = all.get(&snapshot.parent) {
                    prop_assert_eq!(parent.kind, Kind::Committed);
                } else {
                    prop_assert_eq!(&snapshot.parent, "");
                }
                prop_assert!(parents(&records, &snapshot.name).is_ok());
            }
        }
    }
}
