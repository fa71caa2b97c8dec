//! `skimmerd`: the node daemon. Reads its configuration, wires the stages, runs until told to stop.

mod config;

fn main() {}
