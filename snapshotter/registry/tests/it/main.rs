//! The client against a scripted server on real sockets: one well-behaved registry, and every way to
//! be a bad one.

mod blobs;
mod server;
