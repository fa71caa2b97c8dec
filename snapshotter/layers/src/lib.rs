//! A layer as a read-only file system: from a blob's bytes to a mount.

mod buffers;
pub mod config;
pub mod fill;
pub mod fuse;
pub mod indexes;
mod kept;
mod label;
pub mod layer;
pub mod layers;
mod metrics;
pub mod mount;
pub mod pull;
mod pulls;
mod sparse;
pub mod state;
mod turns;

pub use config::{Config, FuseConfig, MountMode};
pub use indexes::Indexes;
pub use layer::{Cause, Failure, Layer, LayerError, LayerSpec, Mounted};
pub use layers::{BundleError, CheckError, Checked, Layers, Mode, Pause, Scrub, Shown, Status};
pub use mount::{Keeping, error_chain};
pub use skimmer_index::toc::annotated as toc_digest;
pub use state::State;
