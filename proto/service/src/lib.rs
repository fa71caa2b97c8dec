//! What our long-running programs do alike: a strict configuration file, a log, a runtime, a private
//! unix socket, health and metrics over HTTP, connections to the control plane, and an end by signal.
//! Knows nothing of images or clusters.

pub mod channel;
pub mod health;
pub mod log;
pub mod program;
pub mod settings;
pub mod socket;
pub mod stop;
