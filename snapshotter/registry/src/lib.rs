//! The registry client: ranges of blobs from container registries, and what a reference stands for;
//! ranges of files at other addresses.
//!
//! One direction of flow: what was configured ([`hosts`], [`credentials`]) → how to get in
//! ([`challenge`], [`auth`]) → one request ([`http`], [`range`]) → whom to ask and how often
//! ([`tries`]) → whole transfers ([`blobs`], [`resolve`]) → [`Registry`]. [`files`] stands beside it: no
//! hosts.toml, no docker credentials.

mod auth;
mod backoff;
mod blobs;
mod challenge;
mod credentials;
pub mod files;
mod hosts;
mod http;
mod manifest;
pub mod media;
mod origin;
mod range;
mod redact;
mod registry;
pub mod resolve;
mod tls;
mod tries;

pub use credentials::{Credential, Places, Told, Written, server_host};
pub use files::{Address, Files};
pub use media::LayerKind;
pub use registry::{Config, Error, Ping, Registry};
pub use resolve::{Descriptor, Document, Resolved, Shelf};
