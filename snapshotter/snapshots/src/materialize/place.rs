//! A second name for a blob's file, in containerd's folder: a hard link, else a copy that shares its blocks where the
//! file system can (a reflink), else one that doesn't.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, ioctl_ficlone, linkat};
use skimmer_proto::Digest;

use super::Way;

/// What containerd gives its blobs.
const MODE: u32 = 0o444;

/// Puts `file`, a blob of `len` bytes, into `store`, containerd's `blobs/sha256`. What is there already is taken for the
/// blob if it is as long: containerd puts only whole ones there, as this does.
pub fn place(file: &File, len: u64, store: &Path, digest: &Digest) -> io::Result<Way> {
    let target = store.join(digest.hex());
    match fs::metadata(&target) {
        Ok(known) if known.len() == len => return Ok(way_of(file, &known)),
        Ok(_) => return Err(io::Error::other("there is a blob of another length")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    if !store.is_dir() {
        // containerd makes them with its first blob. Its own folder has to be there: else this isn't its disk.
        for folder in store.ancestors().take(3).collect::<Vec<_>>().into_iter().rev() {
            make(folder)?;
        }
    }
    let way = match link(file, &target) {
        Ok(()) => Way::Linked,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Way::Linked,
        Err(_) => {
            copy(file, store, &target)?;
            Way::Copied
        }
    };
    // containerd's database is about to say that the blob is there: after a power cut, too.
    File::open(store)?.sync_all()?;
    Ok(way)
}

fn way_of(file: &File, known: &fs::Metadata) -> Way {
    let same =
        file.metadata().is_ok_and(|own| own.ino() == known.ino() && own.dev() == known.dev());
    if same { Way::Linked } else { Way::Copied }
}

fn make(folder: &Path) -> io::Result<()> {
    match fs::create_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// A name for an open file, whatever has become of the one it was opened by.
fn link(file: &File, target: &Path) -> io::Result<()> {
    let own = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(linkat(CWD, own, CWD, target, AtFlags::SYMLINK_FOLLOW)?)
}

/// Under its name only when it is whole.
fn copy(file: &File, store: &Path, target: &Path) -> io::Result<()> {
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(MODE)
        .custom_flags(libc::O_TMPFILE)
        .open(store)?;
    if ioctl_ficlone(&made, file).is_err() {
        // Its own place in the file: the blob's is shared with readers.
        let own = format!("/proc/self/fd/{}", file.as_raw_fd());
        io::copy(&mut File::open(own)?, &mut &made)?;
    }
    made.set_permissions(Permissions::from_mode(MODE))?;
    made.sync_all()?;
    match link(&made, target) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn blob(folder: &Path, bytes: &[u8]) -> File {
        let path = folder.join("data");
        let mut file = File::create_new(&path).unwrap();
        file.write_all(bytes).unwrap();
        file.set_permissions(Permissions::from_mode(MODE)).unwrap();
        File::open(path).unwrap()
    }

    #[test]
    fn a_blob_gets_a_second_name() {
        let folder = tempfile::tempdir().unwrap();
        let (file, digest) = (blob(folder.path(), b"bytes"), Digest::of(b"bytes"));
        let store = folder.path().join("content/blobs/sha256");
        for _ in 0..2 {
            assert_eq!(place(&file, 5, &store, &digest).unwrap(), Way::Linked);
        }
        let placed = fs::metadata(store.join(digest.hex())).unwrap();
        assert_eq!((placed.nlink(), placed.mode() & 0o777), (2, 0o444));
        assert_eq!(placed.ino(), file.metadata().unwrap().ino());
    }

    #[test]
    fn on_another_disk_it_is_copied() {
        let (own, other) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let (file, digest) = (blob(own.path(), b"bytes"), Digest::of(b"bytes"));
        let store = other.path().join("blobs/sha256");
        for _ in 0..2 {
            assert_eq!(place(&file, 5, &store, &digest).unwrap(), Way::Copied);
        }
        let placed = fs::metadata(store.join(digest.hex())).unwrap();
        assert_eq!((placed.nlink(), placed.mode() & 0o777), (1, 0o444));
        assert_eq!(fs::read(store.join(digest.hex())).unwrap(), b"bytes");
        assert_eq!(fs::read_dir(&store).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_content_store_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (file, digest) = (blob(folder.path(), b"bytes"), Digest::of(b"bytes"));
        let store = folder.path().join("nowhere/content/blobs/sha256");
        assert!(place(&file, 5, &store, &digest).is_err());
        let store = folder.path().join("blobs/sha256");
        fs::create_dir_all(&store).unwrap();
        fs::write(store.join(digest.hex()), b"other").unwrap();
        assert_eq!(place(&file, 5, &store, &digest).unwrap(), Way::Copied, "as long");
        assert!(place(&file, 6, &store, &digest).is_err());
    }
}
