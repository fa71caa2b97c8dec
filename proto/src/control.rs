//! `skimmer.control.v1`: what nodes, manager and scheduler say to each other. Generated.

#![allow(
    clippy::all,
    clippy::wildcard_imports,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

tonic::include_proto!("skimmer.control.v1");
