//! What the daemon decides for this crate.

use std::path::PathBuf;
use std::time::Duration;

use skimmer_index::tar::Limits;

/// Settings of [`crate::Layers`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the mounts: `<root>/snapshots/m`.
    pub mounts: PathBuf,
    pub mode: MountMode,
    /// The SELinux context of all files in mounts.
    pub selinux_context: Option<String>,
    /// Blobs shorter than this are fetched whole even if there is an index.
    pub min_layer_bytes: u64,
    /// Whether the table of contents inside a blob without an index is taken at its word until the
    /// layer is complete.
    pub trust_toc: bool,
    /// How long a container must have run before its layers are completed in the background;
    /// `None`: never.
    pub background_delay: Option<Duration>,
    /// How long a reader waits, for its turn and for bytes, before it gets EIO.
    pub deadline: Duration,
    /// Most bytes that one layer may decode to.
    pub max_data_bytes: u64,
    /// What a layer's tar may ask for before it is refused.
    pub limits: Limits,
    /// How many layers are pulled through at once.
    pub pulls: usize,
    pub fuse: FuseConfig,
}

impl Config {
    /// The defaults, with mounts under `mounts`.
    pub fn new(mounts: PathBuf) -> Self {
        Self {
            mounts,
            mode: MountMode::Auto,
            selinux_context: None,
            min_layer_bytes: 1 << 20,
            trust_toc: false,
            background_delay: Some(Duration::from_secs(60)),
            deadline: Duration::from_secs(300),
            max_data_bytes: 256 << 30,
            limits: Limits::default(),
            pulls: 3,
            fuse: FuseConfig::default(),
        }
    }
}

/// Who serves layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountMode {
    /// The kernel those that are complete, if it can, and all others too where nothing but the end of the machine loses
    /// their descriptors; this process the rest, through FUSE.
    Auto,
    /// The kernel all of them. It has to be able to, and somebody has to keep their descriptors.
    Kernel,
    /// This process all of them, through FUSE.
    Fuse,
}

/// How FUSE mounts are served.
#[derive(Clone, Debug)]
pub struct FuseConfig {
    /// Threads that take requests from the kernel, per mount.
    pub threads: usize,
    /// The kernel's read-ahead for a mount whose bytes are all on disk, KiB.
    pub read_ahead_kib: u32,
    /// The same while bytes may have to be fetched: what is read ahead in vain is then fetched in vain.
    pub lazy_read_ahead_kib: u32,
    /// Reads ahead, as most through the page cache are, that the kernel may have in flight, per mount: it holds back what
    /// is more, and that waits without being seen. No more than 64 where requests are written down (see
    /// [`resend`](Self::resend)). A mount stays with what it began with.
    pub max_background: u16,
    /// Reads that wait for bytes at once, over all mounts (see [`crate::turns`]); more wait their turn.
    pub max_waiting: usize,
    /// Whether the kernel is asked, if it can (Linux 6.9), to send again what a dead process left unanswered; else it is
    /// written down (see [`crate::fuse::journal`]). A mount stays with what it began with.
    pub resend: bool,
}

impl Default for FuseConfig {
    fn default() -> Self {
        Self {
            threads: 1,
            read_ahead_kib: 1024,
            lazy_read_ahead_kib: 128,
            max_background: 1024,
            max_waiting: 256,
            resend: true,
        }
    }
}
