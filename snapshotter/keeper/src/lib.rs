//! File descriptors that outlive the process which uses them: kept by somebody who does nothing else.
//!
//! A descriptor of `/dev/fuse` is a mount's life: as long as somebody has it open, readers wait for an answer, and a
//! new process can give it. [`Keeper`] is who keeps it: systemd's descriptor store, or [`hold`], a process for that.

pub mod hold;
mod holder;
pub mod memory;
mod systemd;
mod wire;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use holder::Holder;
pub use systemd::Systemd;
pub use wire::MAX_NAME;

/// Keeps descriptors by name for whoever comes after this process.
pub trait Keeper: Send + Sync + 'static {
    /// Keeps a duplicate of `fd` until it is [released](Self::release). Once this succeeds, it survives this process; if
    /// this fails, it does from when whoever isn't there now is back.
    fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Error>;

    /// Closes what is kept under `name`, if anything is; where whoever keeps it isn't there, as soon as it is back.
    fn release(&self, name: &str) -> Result<(), Error>;

    /// How long what is kept is safe.
    fn lasts(&self) -> Lasts;
}

/// Until when a [`Keeper`] keeps what it was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasts {
    /// Until the machine is shut down.
    Machine,
    /// Until the process that keeps it dies.
    Process,
    /// Until this process is stopped on purpose.
    UntilStop,
}

/// A descriptor that an earlier process left.
#[derive(Debug)]
pub struct Kept {
    pub name: String,
    pub fd: OwnedFd,
}

/// Where descriptors are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In systemd's store, if it offers one; else at [`hold`], if it answers at this address; else nowhere.
    Auto(PathBuf),
    Systemd,
    /// At [`hold`].
    Holder(PathBuf),
    Nowhere,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("reach the holder of descriptors at {} (is `skimmerd hold` running?)", address.display())]
    Connect { address: PathBuf, source: std::io::Error },
    #[error("talk to the holder of descriptors at {}", address.display())]
    Talk { address: PathBuf, source: wire::Error },
    #[error("the holder of descriptors refuses {name}: {reason}")]
    Refused { name: String, reason: String },
    #[error(
        "systemd offers no descriptor store: set FileDescriptorStoreMax= and NotifyAccess=main in the unit"
    )]
    NoStore,
    #[error("hand a descriptor to systemd")]
    Notify { source: std::io::Error },
    #[error("systemd hasn't said within {limit:?} that it has taken a descriptor")]
    Unanswered { limit: std::time::Duration },
    #[error("systemd keeps no more than {max} descriptors of this unit (FileDescriptorStoreMax=)")]
    Full { max: usize },
    #[error(
        "the names of what systemd keeps of this unit would be longer than {limit} bytes, with which it couldn't be \
         started again"
    )]
    Names { limit: usize },
    #[error("make a file in memory")]
    Memory { source: nix::Error },
    #[error(
        "the name {name:?} of a descriptor is empty, longer than {MAX_NAME} bytes or not plain ASCII"
    )]
    Name { name: String },
}

/// The keeper at `place`, and what it keeps for us; `None` if there is none.
pub fn open(place: &Place) -> Result<Option<(Arc<dyn Keeper>, Vec<Kept>)>, Error> {
    match place {
        Place::Nowhere => Ok(None),
        Place::Systemd => systemd().map(Some),
        Place::Holder(address) => holder(address).map(Some),
        Place::Auto(address) => {
            if Systemd::offered() {
                return systemd().map(Some);
            }
            match holder(address) {
                Ok(opened) => Ok(Some(opened)),
                Err(Error::Connect { source, .. })
                    if matches!(
                        source.kind(),
                        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                    ) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        }
    }
}

fn systemd() -> Result<(Arc<dyn Keeper>, Vec<Kept>), Error> {
    let (systemd, kept) = Systemd::open()?;
    Ok((Arc::new(systemd), kept))
}

fn holder(address: &Path) -> Result<(Arc<dyn Keeper>, Vec<Kept>), Error> {
    let (holder, kept) = Holder::connect(address)?;
    Ok((holder, kept))
}

/// A name fits systemd's rules for them as well as the holder's.
fn check(name: &str) -> Result<(), Error> {
    let plain = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b':');
    if plain && !name.is_empty() && name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(Error::Name { name: name.to_owned() })
}
