//! The manager: who belongs to a cluster, and what its nodes may read. Decides by what the store
//! holds and by what a registry answers; the time is an argument, in Unix seconds.

pub mod manager;
pub mod policy;
pub mod registries;

pub use manager::{Application, Asked, Error, Issued, Manager, SILENCE, Settings};
pub use policy::Policy;
pub use registries::{AskRegistry, Question, Registries};
