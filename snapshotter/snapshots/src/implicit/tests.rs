//! What a cover holds, on layers in memory.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::{Attributes, Cover, Look, OWN, plan};

type Folder = BTreeMap<PathBuf, Look>;

fn attributes(mode: u32) -> Attributes {
    Attributes { mode, ..Attributes::default() }
}

fn dir(mode: u32, opaque: bool) -> Look {
    Look::Dir { attributes: attributes(mode), opaque }
}

/// A folder from `path=what`: an octal mode of a directory, with `o` before it of an opaque one, or
/// `x` for something else. The root is 0700.
fn folder(text: &str) -> Folder {
    let mut folder = Folder::from([(PathBuf::new(), dir(0o700, false))]);
    for entry in text.split_whitespace() {
        let (path, what) = entry.split_once('=').unwrap();
        let mode = |text| u32::from_str_radix(text, 8).unwrap();
        let look = match (what, what.strip_prefix('o')) {
            ("x", _) => Look::Other,
            (_, Some(opaque)) => dir(mode(opaque), true),
            (plain, None) => dir(mode(plain), false),
        };
        folder.insert(path.into(), look);
    }
    folder
}

fn planned(implicit: &[PathBuf], folders: &[Folder]) -> Cover {
    let mut look = |at: usize, path: &Path| -> Result<Look, Infallible> {
        let above = path.ancestors().skip(1);
        for path in above {
            assert!(matches!(folders[at][path], Look::Dir { .. }), "asked below {path:?}");
        }
        Ok(folders[at].get(path).cloned().unwrap_or(Look::Absent))
    };
    plan(implicit, folders.len(), &mut look).unwrap()
}

fn check(implicit: &str, folders: &[&str], expected: &str) {
    let implicit: Vec<_> = implicit.split_whitespace().map(PathBuf::from).collect();
    let folders: Vec<_> = folders.iter().map(|text| folder(text)).collect();
    let found: Vec<_> = planned(&implicit, &folders)
        .into_iter()
        .map(|(path, attributes)| format!("{}={:o}", path.display(), attributes.mode))
        .collect();
    assert_eq!(found.join(" "), expected);
}

#[test]
fn the_nearest_directory_below_counts() {
    check("tmp", &["tmp=755", "tmp=1777"], "=700 tmp=1777");
    check("tmp", &["tmp=755", "", "tmp=711", "tmp=1777"], "=700 tmp=711");
    // Names are compared whole, whatever sorts between.
    check("a a-b a/c", &["a=755 a-b=755 a/c=755", "a=1 a/c=2"], "=700 a=1 a/c=2");
}

#[test]
fn covers_nothing_without_need() {
    check("", &["tmp=755", "tmp=1777"], "");
    check("tmp", &["tmp=755"], "");
    check("tmp", &["tmp=755", "var=700"], "");
    check("tmp", &["tmp=755", "tmp=755", "tmp=1777"], "");
    check("app app/lib", &["app=755 app/lib=755", "", ""], "");
    // The index says so, the folder has none.
    check("tmp", &["", "tmp=1777"], "");
    check(&"a".repeat(3000), &["", ""], "");
}

#[test]
fn ancestors_keep_what_the_layer_says() {
    check("a/b", &["a=711 a/b=755", "a=700 a/b=1777"], "=700 a=711 a/b=1777");
    // Implicit themselves, they look as below even if that is nothing new.
    check("a a/b", &["a=755 a/b=755", "a=755 a/b=1777"], "=700 a=755 a/b=1777");
    let own = "a=755 a/b=755 a/c=755 d=755";
    check("a/b a/c d", &[own, "a=700 a/b=1 a/c=2 d=3"], "=700 a=755 a/b=1 a/c=2 d=3");
}

#[test]
fn nothing_is_seen_behind_what_hides_it() {
    check("a/b", &["a=755 a/b=755", "a=x", "a=755 a/b=1777"], "");
    check("a/b", &["a=755 a/b=755", "a=755 a/b=x", "a=755 a/b=1777"], "");
    check("a/b", &["a=755 a/b=755", "a=o755", "a=755 a/b=1777"], "");
    check("a/b", &["a=o755 a/b=755", "a=755 a/b=1777"], "");
    check("a", &["a=o755", "a=1777"], "");
    check("a", &["a=755", "a=o1777", "a=700"], "=700 a=1777");
}

/// Metadata of a directory in the stack of folders, as overlayfs answers.
fn shown(folders: &[&Folder], path: &Path) -> Option<Attributes> {
    let mut names: Vec<&Path> = path.ancestors().collect();
    names.pop();
    let mut merged = folders.to_vec();
    let mut top = None;
    for name in names.into_iter().rev() {
        let mut next = Vec::new();
        top = None;
        for folder in merged {
            match folder.get(name) {
                None => {}
                Some(Look::Dir { attributes, opaque }) => {
                    top.get_or_insert(attributes.clone());
                    next.push(folder);
                    if *opaque {
                        break;
                    }
                }
                Some(_) => break,
            }
        }
        merged = next;
    }
    top
}

fn any_folder() -> impl Strategy<Value = Folder> {
    let look = prop_oneof![
        1 => Just(None),
        1 => Just(Some(Look::Other)),
        4 => (0..3u32, prop::bool::weighted(0.2)).prop_map(|(mode, opaque)| Some(dir(mode, opaque))),
    ];
    let names = ["a", "a-b", "b"];
    let mut paths: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    paths.extend(names.iter().flat_map(|a| names.iter().map(move |b| Path::new(a).join(b))));
    paths.extend(names.iter().map(|c| Path::new("a/b").join(c)));
    prop::collection::vec(look, paths.len()).prop_map(move |looks| {
        let mut folder = folder("");
        for (path, look) in paths.iter().zip(looks) {
            let parent = path.parent().unwrap();
            if let (Some(look), Some(Look::Dir { .. })) = (look, folder.get(parent)) {
                folder.insert(path.clone(), look);
            }
        }
        folder
    })
}

proptest! {
    #[test]
    fn a_covered_layer_shows_what_is_below(
        folders in prop::collection::vec(any_folder(), 1..5),
        picked in prop::collection::vec(any::<bool>(), 20),
    ) {
        let own = &folders[OWN];
        let is_dir = |look: &Look| matches!(look, Look::Dir { .. });
        let dirs: Vec<_> = own.iter().filter(|(_, look)| is_dir(look)).map(|(p, _)| p).skip(1).collect();
        let implicit: Vec<PathBuf> = dirs
            .iter()
            .zip(picked)
            .filter(|(_, picked)| *picked)
            .map(|(path, _)| (*path).clone())
            .collect();
        let cover: Folder = planned(&implicit, &folders)
            .into_iter()
            .map(|(path, attributes)| (path, Look::Dir { attributes, opaque: false }))
            .collect();
        let below: Vec<&Folder> = folders.iter().skip(1).collect();
        let mut stack = vec![&cover];
        stack.extend(&folders);
        for path in dirs {
            let hidden = path.ancestors().any(|path| matches!(own[path], Look::Dir { opaque: true, .. }));
            let wanted = match implicit.contains(path) && !hidden {
                true => shown(&below, path).or_else(|| shown(&[own], path)),
                false => shown(&[own], path),
            };
            prop_assert_eq!(shown(&stack, path), wanted, "{:?}", path);
        }
        for (path, _) in cover.iter() {
            let needed = |needed: &&PathBuf| needed.starts_with(path)
                && cover.contains_key(*needed)
                && shown(&[&cover], needed) != shown(&[own], needed);
            prop_assert!(implicit.iter().any(|path| needed(&path)), "{:?} in vain", path);
        }
    }
}
