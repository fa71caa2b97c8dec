//! How far the kernel reads ahead in the files of a mount: `/sys/class/bdi/<name>/read_ahead_kb`.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::kernel::FILE_SYSTEM;
use super::mount_info;

const FOLDER: &str = "/sys/class/bdi";

/// The name under which a mount's read-ahead is found.
#[derive(Debug, Default, PartialEq, Eq)]
pub enum Bdi {
    /// Its device number.
    #[default]
    Device,
    /// `erofs-<number>`, of EROFS over files. Nothing but when it appeared says whose it is.
    Numbered(String),
}

impl Bdi {
    /// Mounts by `mount`, and finds out the name that came with it.
    pub fn of_new<E>(mount: impl FnOnce() -> Result<(), E>) -> Result<Self, E> {
        static ALONE: Mutex<()> = Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = numbered();
        mount()?;
        Ok(Self::between(&before, &numbered()))
    }

    /// The name that is new, if it is the only one: else somebody else has mounted something as well.
    fn between(before: &BTreeSet<String>, after: &BTreeSet<String>) -> Self {
        let mut new = after.difference(before);
        match (new.next(), new.next()) {
            (Some(name), None) => Self::Numbered(name.clone()),
            _ => Self::Device,
        }
    }

    /// Sets the read-ahead of the mount at `path`. Where it can't be set, reads are slower or longer, but right, so
    /// that failing is not an error.
    pub fn set_read_ahead(&self, path: &Path, kib: u32) {
        let name = match self {
            Self::Device => device(path),
            Self::Numbered(name) => Ok(name.clone()),
        };
        let written = name
            .and_then(|name| fs::write(format!("{FOLDER}/{name}/read_ahead_kb"), kib.to_string()));
        if let Err(error) = written {
            tracing::debug!(path = %path.display(), %error, "read-ahead stays at the kernel's default");
        }
    }
}

fn device(path: &Path) -> io::Result<String> {
    let lines = mount_info().map_err(io::Error::other)?;
    let line = lines.into_iter().rfind(|line| line.mount_point == path);
    Ok(line.ok_or_else(|| io::Error::other("not in /proc/self/mountinfo"))?.device)
}

fn numbered() -> BTreeSet<String> {
    let names = fs::read_dir(FOLDER).into_iter().flatten();
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| name.starts_with(FILE_SYSTEM)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_only_if_nobody_else_s_is_new() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let before: BTreeSet<String> = names(&["erofs-1", "erofs-2"]);
        for (after, expected) in [
            (names(&["erofs-2", "erofs-7"]), Bdi::Numbered("erofs-7".to_owned())),
            (names(&["erofs-1", "erofs-7", "erofs-8"]), Bdi::Device),
            (names(&["erofs-1", "erofs-2"]), Bdi::Device),
        ] {
            assert_eq!(Bdi::between(&before, &after), expected, "{after:?}");
        }
    }
}
