//! Who keeps the descriptors of mounts while no daemon runs, and the daemon's own words about it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use skimmer_keeper::{Holder, Lasts, Place, Systemd, memory};
use skimmer_layers::Keeping;
use skimmer_layers::mount::Mounts;
use skimmer_proto::Digest;

use crate::config::{Config, Mount, MountKeeper};

/// How long readers of incomplete layers are told, once these are unmounted, that nobody will get them their bytes.
const SETTLING: Duration = Duration::from_secs(3);

/// Where layers are mounted.
pub fn mounts(config: &Config) -> PathBuf {
    config.root.join("snapshots/m")
}

/// The keeper that `mount.keeper` names.
pub fn open(config: &Config) -> anyhow::Result<Keeping> {
    let address = config.mount.holder_address.clone();
    let place = match config.mount.keeper {
        MountKeeper::Auto => Place::Auto(address),
        MountKeeper::Systemd => Place::Systemd,
        MountKeeper::Holder => Place::Holder(address),
        MountKeeper::None => Place::Nowhere,
    };
    let keeping = skimmer_keeper::open(&place)
        .context("find who keeps the descriptors of mounts (mount.keeper)")?;
    if keeping.is_none() {
        tracing::info!(
            "nobody keeps the descriptors of mounts: lazily mounted layers fail when this process ends"
        );
    }
    Ok(keeping)
}

/// Who keeps the descriptors of mounts for this process's successor, as was settled when this process started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeptBy {
    Systemd,
    /// The holder at this address.
    Holder(PathBuf),
    /// Nobody: systemd offered no store, and no holder was at this address.
    Nobody(PathBuf),
    /// Nobody, because `mount.keeper` says so.
    Unwanted,
}

impl KeptBy {
    pub fn of(config: &Mount, keeping: &Keeping) -> Self {
        let address = config.holder_address.clone();
        match keeping.as_ref().map(|(keeper, _)| keeper.lasts()) {
            Some(Lasts::Machine | Lasts::UntilStop) => Self::Systemd,
            Some(Lasts::Process) => Self::Holder(address),
            None if config.keeper == MountKeeper::None => Self::Unwanted,
            None => Self::Nobody(address),
        }
    }

    /// Whether they are safe right now: a holder may have gone, a unit may have been disabled. Blocks.
    pub fn is_safe(&self) -> bool {
        match self {
            Self::Systemd => Systemd::survives_stop(),
            Self::Holder(address) => Holder::answers(address),
            Self::Nobody(_) | Self::Unwanted => false,
        }
    }
}

/// The file in memory in which the credentials of pulls outlive this process; `None` if nobody keeps it. Where there are
/// to be none, what an earlier process left is given up.
pub fn credentials(config: &Config, keeping: &mut Keeping) -> anyhow::Result<Option<File>> {
    let Some((keeper, kept)) = keeping else { return Ok(None) };
    let name = credentials_name(config);
    let has_none =
        config.cri.address.as_os_str().is_empty() || config.cri.remember_credentials.is_zero();
    if has_none {
        memory::discard(keeper, kept, &name).context("give up the credentials of pulls")?;
        return Ok(None);
    }
    let memory = memory::open(keeper, kept, &name);
    memory.context("keep the credentials of pulls for this process's successor").map(Some)
}

/// Daemons with other roots may share a keeper.
fn credentials_name(config: &Config) -> String {
    let place = Digest::of(config.root.as_os_str().as_encoded_bytes()).hex();
    format!("credentials-1.{}", &place[..8])
}

/// Unmounts what a stopped daemon left; whoever still reads there gets an error.
pub fn unmount(config: &Config) -> anyhow::Result<()> {
    let address = &config.snapshots.address;
    if UnixStream::connect(address).is_ok() {
        anyhow::bail!("skimmerd serves {}: stop it first", address.display());
    }
    let mut keeping = open(config)?;
    if let Some((keeper, kept)) = &mut keeping {
        memory::discard(keeper, kept, &credentials_name(config))
            .context("give up the credentials of pulls")?;
    }
    let mounts = Mounts::open(&mounts(config), skimmer_layers::MountMode::Auto, keeping)?;
    let mut unmounted = 0;
    for blob in mounts.left() {
        for left in mounts.take_left(blob) {
            mounts.discard(left);
            unmounted += 1;
        }
    }
    println!("unmounted {unmounted} layers");
    let deadline = Instant::now() + SETTLING;
    while !mounts.is_settled() {
        if Instant::now() > deadline {
            println!(
                "containers still use layers that are not complete: what they read of these waits until skimmerd runs again"
            );
            return Ok(());
        }
        thread::sleep(Duration::from_millis(50));
    }
    mounts.forget_all().context("release the descriptors that are kept for all mounts")
}
