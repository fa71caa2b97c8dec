//! `skimmer.node.v1`: what the command line asks of the daemon. Generated.

#![allow(
    clippy::all,
    clippy::wildcard_imports,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

tonic::include_proto!("skimmer.node.v1");
