//! containerd's snapshot service: ordinary snapshots on overlayfs, and layers that are mounted
//! before they have arrived.

pub mod binding;
pub mod chain;
mod convert;
pub mod filter;
pub mod folders;
pub mod identify;
pub mod idmap;
pub mod implicit;
pub mod install;
pub mod inventory;
pub mod layers;
pub mod materialize;
pub mod metrics;
pub mod mounts;
pub mod records;
pub mod remap;
pub mod service;
pub mod session;
pub mod snapshot;
pub mod snapshotter;
mod usage;

pub use binding::Binding;
pub use layers::{LayerBlame, LayerError, LayerStore};
pub use service::service;
pub use snapshot::{Kind, Labels, Snapshot, Usage};
pub use snapshotter::{Config, Error, Snapshotter};

/// containerd's messages and service. Generated.
#[allow(
    clippy::all,
    clippy::wildcard_imports,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub mod proto {
    tonic::include_proto!("containerd.services.snapshots.v1");
}
