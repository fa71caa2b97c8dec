//! The cache against a scripted source and a real directory.

#![expect(clippy::unwrap_used, reason = "a test that can't go on ends")]

mod blobs;
mod crash;
mod evict;
mod failures;
mod layers;
mod rot;
mod scattered;
mod twin;
mod whole;
