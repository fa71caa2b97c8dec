//! A program's unix socket: private, and never blocked by what a dead predecessor left.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;

use anyhow::Context as _;
use tokio::net::UnixListener;

/// Listens at `address`, which the configuration key `key` says, with mode 0600. A stale socket is
/// replaced; a live one is an error.
pub fn listen(key: &str, address: &Path) -> anyhow::Result<UnixListener> {
    if let Some(directory) = address.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("create directory {}", directory.display()))?;
    }
    if StdUnixStream::connect(address).is_ok() {
        anyhow::bail!("another process serves {} ({key})", address.display());
    }
    match fs::remove_file(address) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error)
                .with_context(|| format!("remove stale socket {}", address.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(address)
        .with_context(|| format!("listen on {} ({key})", address.display()))?;
    fs::set_permissions(address, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("restrict {} to its owner", address.display()))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn replaces_a_stale_socket_and_refuses_a_live_one() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("run/skimmerd.sock");
        drop(listen("snapshots.address", &address).unwrap());
        let live = listen("snapshots.address", &address).unwrap();
        let mode = fs::metadata(&address).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = listen("snapshots.address", &address).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(live);
    }
}
