//! From a snapshot and its folders to what containerd mounts. Pure.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::{Kind, Labels, idmap};

/// One mount, in containerd's terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    pub source: String,
    pub options: Vec<String>,
}

/// Where the parts of a snapshot are.
#[derive(Clone, Debug, Default)]
pub struct Folders {
    /// What the snapshot itself holds.
    pub upper: PathBuf,
    /// Overlayfs's working folder, on the same file system.
    pub work: PathBuf,
    /// The contents of the snapshot parents, nearest first.
    pub lower: Vec<PathBuf>,
}

/// The mount for a view or active snapshot. With `remap`, mappings in the labels become mount
/// options (containerd was told that we can `remap-ids`).
pub fn mounts(kind: Kind, labels: &Labels, folders: &Folders, remap: bool) -> Vec<Mount> {
    let mut options = if remap { idmap::options(labels) } else { Vec::new() };
    let writable = kind == Kind::Active;
    let lower = distinct(&folders.lower);
    // Overlayfs needs a lower folder, and one alone needs no overlayfs if nobody writes.
    let single = match lower[..] {
        [] => Some(&folders.upper),
        [only] if !writable => Some(only),
        _ => None,
    };
    if let Some(folder) = single {
        options.push(if writable { "rw" } else { "ro" }.to_owned());
        options.push("rbind".to_owned());
        let source = folder.to_string_lossy().into_owned();
        return vec![Mount { kind: "bind", source, options }];
    }
    if writable {
        options.push(format!("workdir={}", folders.work.display()));
        options.push(format!("upperdir={}", folders.upper.display()));
    }
    let lower: Vec<_> = lower.iter().map(|folder| folder.to_string_lossy()).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    options.push("index=off".to_owned());
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

/// Each folder once: an image may have a layer several times (an empty one, mostly). Overlayfs refuses a
/// folder that it was given already, and shows nothing of it that the nearer one doesn't.
pub fn distinct(lower: &[PathBuf]) -> Vec<&PathBuf> {
    let mut seen = BTreeSet::new();
    lower.iter().filter(|folder| seen.insert(*folder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: Kind, lower: &[&str], remap: bool, expected: (&'static str, &str, &[&str])) {
        let labels = [(idmap::UID_LABEL, "0:9:1"), (idmap::GID_LABEL, "0:8:1")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let lower = lower.iter().map(PathBuf::from).collect();
        let folders = Folders { upper: "/s/9/fs".into(), work: "/s/9/work".into(), lower };
        let found = mounts(kind, &labels, &folders, remap);
        let (kind, source, options) = expected;
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        assert_eq!(found, [Mount { kind, source: source.to_owned(), options }]);
    }

    #[test]
    fn binds_one_folder_and_overlays_several() {
        check(Kind::Active, &[], false, ("bind", "/s/9/fs", &["rw", "rbind"]));
        check(Kind::View, &[], false, ("bind", "/s/9/fs", &["ro", "rbind"]));
        check(Kind::View, &["/s/m/1"], false, ("bind", "/s/m/1", &["ro", "rbind"]));
        let overlay = ["workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/s/m/1", "index=off"];
        check(Kind::Active, &["/s/m/1"], false, ("overlay", "overlay", &overlay));
        let overlay = ["lowerdir=/s/m/2:/s/1/fs", "index=off"];
        check(Kind::View, &["/s/m/2", "/s/1/fs"], false, ("overlay", "overlay", &overlay));
    }

    #[test]
    fn a_layer_that_comes_twice_is_named_once() {
        let overlay = ["lowerdir=/s/m/2:/s/m/1:/s/m/3", "index=off"];
        let lower = ["/s/m/2", "/s/m/1", "/s/m/2", "/s/m/3", "/s/m/1"];
        check(Kind::View, &lower, false, ("overlay", "overlay", &overlay));
        let twice = ["/s/m/1", "/s/m/1"];
        check(Kind::View, &twice, false, ("bind", "/s/m/1", &["ro", "rbind"]));
    }

    #[test]
    fn maps_ids_by_options() {
        let options = ["uidmap=0:9:1", "gidmap=0:8:1", "rw", "rbind"];
        check(Kind::Active, &[], true, ("bind", "/s/9/fs", &options));
        let options = ["uidmap=0:9:1", "gidmap=0:8:1", "lowerdir=/a:/b", "index=off"];
        check(Kind::View, &["/a", "/b"], true, ("overlay", "overlay", &options));
    }
}
