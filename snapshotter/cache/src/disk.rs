//! The few file operations that crash safety rests on.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use nix::fcntl::OFlag;

/// The whole file, or `None` if there is none.
pub fn read_optional(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces `dir/name`: a crash leaves the old file or the new one, both whole.
pub fn write_atomically(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!("{name}.tmp"));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, dir.join(name))
}

/// Removes a file, if it is there, for good: it stays removed after a power cut.
pub fn remove_durably(dir: &Path, name: &str) -> io::Result<()> {
    if remove(&dir.join(name))? {
        sync_dir(dir)?;
    }
    Ok(())
}

/// Whether there was a file to remove.
pub fn remove(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// A new file on the file system of `dir`, for reading and writing, that is gone when it is closed.
pub fn unnamed(dir: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(OFlag::O_TMPFILE.bits()).open(dir)
}

pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A directory's modification time is when its blob or layer was last used: it survives the loss of
/// any database, and the checkpoints written into it move it too.
pub fn touch(dir: &Path) -> io::Result<()> {
    File::open(dir)?.set_modified(SystemTime::now())
}

/// The bytes that the files in `dir` occupy, holes not counted. No directory, no bytes.
pub fn allocated(dir: &Path) -> io::Result<u64> {
    Ok(files(dir)?.iter().sum())
}

/// The bytes that `dir` and the files in it occupy, and how many they are.
pub fn occupied(dir: &Path) -> io::Result<(u64, u64)> {
    let own = match fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, 0)),
        metadata => metadata?.blocks() * 512,
    };
    let files = files(dir)?;
    Ok((own + files.iter().sum::<u64>(), 1 + files.len() as u64))
}

/// What each file in `dir` occupies, in bytes.
fn files(dir: &Path) -> io::Result<Vec<u64>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        match entry?.metadata() {
            Ok(metadata) => files.push(metadata.blocks() * 512),
            // Replaced or evicted while we looked.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
}
