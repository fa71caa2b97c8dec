//! containerd's snapshot service over lazily mounted layers.

pub mod install;
