//! Who a node is, what it may read, and what it vouches for.
//!
//! Owns: node keys and peer ids, the authorities of clusters and of the control plane, membership
//! certificates, the TLS configurations that check them, grants, and signed statements.
//! Does not own: where certificates are stored, when they are renewed, and any socket or clock:
//! the time is an argument, in seconds since the Unix epoch.
//!
//! Everything that is decoded here comes from outside: it is bounded, and it never panics.

pub mod authority;
pub mod certificate;
pub mod grant;
pub mod key;
pub mod peer;
pub mod statement;
pub mod tls;
pub mod token;
pub mod trust;

pub use authority::Authority;
pub use certificate::{Membership, Role};
pub use grant::Grant;
pub use key::{Key, read_csr};
pub use peer::PeerId;
pub use statement::SignedValue;
pub use tls::Credentials;
pub use token::JoinToken;
pub use trust::Trust;
