//! The image service of CRI, between kubelet and containerd.
//!
//! Every call goes on to containerd as it is, byte for byte, and so does the answer: [`proxy`]. A pull is looked at on
//! its way ([`pull`]): it brings credentials, and is the moment to have an image's blobs where containerd looks for them.
//! [`socket`] and [`authority`] let clients in that name a unix socket by its path, as Go's do.

pub mod authority;
mod proxy;
mod pull;
mod socket;

pub use proxy::{Proxy, Stage};
pub use socket::Client;
