//! The cache against a scripted source and a real directory.

mod blobs;
mod twin;
