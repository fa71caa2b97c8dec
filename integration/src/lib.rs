//! Fixtures for system tests and benchmarks: real containerds, registries and images, each private to a
//! scenario and gone after it.
//!
//! Everything is synchronous to its caller and cleans up when dropped, also when a test panics. What a fixture waits
//! for is a state that it polls, never a fixed time. Root is needed: mounts, namespaces, containers.

pub mod command;
pub mod containerd;
pub mod control;
pub mod cri;
pub mod crictl;
pub mod ctr;
pub mod debian;
pub mod docker_config;
pub mod estargz;
pub mod files;
pub mod fleet;
pub mod front;
pub mod http;
pub mod image;
pub mod interrupt;
pub mod issuer;
pub mod layer;
pub mod log_check;
pub mod member;
pub mod memory_limit;
pub mod mounts;
pub mod names;
pub mod network;
pub mod node;
pub mod outsider;
pub mod process;
pub mod registry;
pub mod scenario;
pub mod sim;
pub mod skimmer;
pub mod skimmerd;
pub mod snapshots;
pub mod speech;
pub mod start;
pub mod streamed;
pub mod sweep;
pub mod switch;
pub mod systemd;
pub mod tar;
pub mod tools;
pub mod tree;
pub mod world;
pub mod zstd_chunked;
