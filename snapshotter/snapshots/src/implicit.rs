//! Directories that a layer leaves out, above layers that have them. Pure; what does it is in
//! `disk`.
//!
//! A tar may hold `tmp/x` without an entry for `tmp`. The layer then has a directory `tmp` with
//! made-up metadata, and overlayfs takes the metadata of the uppermost directory: that of a `/tmp`
//! below, mode 1777, would be lost. Unpacking, containerd gives such directories the metadata that
//! the layers below show. We put a *cover* above the layer instead: a tree of only those
//! directories, with the right metadata.
//!
//! What the layers below show is decided as overlayfs does: the first folder that has a directory
//! counts, and nothing is seen behind anything else of that name or behind an opaque directory.

mod disk;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

pub use disk::{Error, look, make};

/// The place of the layer's own folder among the folders.
pub const OWN: usize = 0;

/// Longest path that is covered, so that those in the folders are still below the 4,096 bytes that
/// Linux takes.
const MAX_PATH: usize = 2048;

/// Metadata of a directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds.
    pub mtime: (i64, i64),
    /// Extended attributes, by full name, except `trusted.*`: overlayfs's own and no image's.
    pub xattrs: BTreeMap<OsString, Vec<u8>>,
}

/// What one folder has under a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    Absent,
    Dir {
        attributes: Attributes,
        /// Hides what is below.
        opaque: bool,
    },
    /// Something that is no directory, a whiteout for instance.
    Other,
}

/// The directories of a cover, its root first, each before those in it; paths from the root. Empty
/// if there is nothing to cover.
pub type Cover = Vec<(PathBuf, Attributes)>;

/// A directory that the walk is in.
struct Dir<'a> {
    path: &'a Path,
    /// The folders that are merged here, uppermost first.
    folders: Vec<usize>,
    /// What it shall have in the cover.
    attributes: Attributes,
    in_cover: bool,
}

/// The cover for a layer with these implicit directories. `look` looks into one of `folders`
/// folders: the layer's own ([`OWN`]), then those below, nearest first. It is asked for a path only
/// where that folder has a directory at each of its ancestors.
pub fn plan<E>(
    implicit: &[PathBuf],
    folders: usize,
    look: &mut dyn FnMut(usize, &Path) -> Result<Look, E>,
) -> Result<Cover, E> {
    let mut cover = Cover::new();
    let mut sorted: Vec<&Path> = implicit.iter().map(PathBuf::as_path).collect();
    // By components: each directory is followed by all those in it.
    sorted.sort_unstable();
    sorted.retain(|path| path.as_os_str().len() <= MAX_PATH);
    let root = Path::new("");
    if sorted.is_empty() {
        return Ok(cover);
    }
    let Look::Dir { attributes, .. } = look(OWN, root)? else { return Ok(cover) };
    // Roots are merged whatever they say.
    let mut walk =
        vec![Dir { path: root, folders: (0..folders).collect(), attributes, in_cover: false }];
    let mut hidden: Option<&Path> = None;
    for path in sorted {
        if hidden.is_some_and(|hidden| path.starts_with(hidden)) {
            continue;
        }
        while walk.last().is_some_and(|dir| !path.starts_with(dir.path)) {
            walk.pop();
        }
        let depth = walk.len();
        let mut missing: Vec<&Path> = path.ancestors().collect();
        missing.reverse();
        for step in missing.into_iter().skip(depth) {
            let Some(parent) = walk.last() else { break };
            let Some((dir, differs)) = enter(parent, step, step == path, look)? else {
                hidden = Some(step);
                break;
            };
            walk.push(dir);
            if differs {
                emit(&mut walk, &mut cover);
            }
        }
    }
    Ok(cover)
}

/// The directory `path` in `parent`, and whether the layer has other metadata for it than it shall
/// have; `None` if nothing below the layer shows it.
fn enter<'a, E>(
    parent: &Dir<'_>,
    path: &'a Path,
    implicit: bool,
    look: &mut dyn FnMut(usize, &Path) -> Result<Look, E>,
) -> Result<Option<(Dir<'a>, bool)>, E> {
    let (mut own, mut below) = (None, None);
    let mut folders = Vec::new();
    for &folder in &parent.folders {
        match look(folder, path)? {
            Look::Absent => {}
            Look::Other => break,
            Look::Dir { attributes, opaque } => {
                folders.push(folder);
                let seen = if folder == OWN { &mut own } else { &mut below };
                seen.get_or_insert(attributes);
                if opaque {
                    break;
                }
            }
        }
    }
    let (Some(own), Some(below)) = (own, below) else { return Ok(None) };
    let differs = implicit && own != below;
    let attributes = if implicit { below } else { own };
    Ok(Some((Dir { path, folders, attributes, in_cover: false }, differs)))
}

/// Adds the directory that the walk is in to the cover, with those above that aren't there yet.
fn emit(walk: &mut [Dir<'_>], cover: &mut Cover) {
    for dir in walk.iter_mut().filter(|dir| !dir.in_cover) {
        dir.in_cover = true;
        cover.push((dir.path.to_owned(), dir.attributes.clone()));
    }
}
