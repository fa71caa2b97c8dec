//! The client against a scripted server on real sockets: one well-behaved registry, and every way to
//! be a bad one.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "clippy knows test functions, but not what they call; sizes here are small"
)]

mod auth;
mod blobs;
mod mirrors;
mod resolve;
mod server;
mod tls;
