//! Layers over a source in memory, mounted for real: needs root and `/dev/fuse`.

#![expect(clippy::unwrap_used, reason = "these are tests")]

mod bad;
mod cold;
mod folders;
mod gaps;
mod keeper;
mod kernel;
mod lazy;
mod node;
mod prefill;
mod rot;
mod status;
mod toc;
mod tree;
