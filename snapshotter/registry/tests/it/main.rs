//! The client against a scripted server on real sockets: one well-behaved registry, and every way to
//! be a bad one.

mod auth;
mod blobs;
mod mirrors;
mod resolve;
mod server;
mod tls;
