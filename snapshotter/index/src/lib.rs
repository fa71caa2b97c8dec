//! A layer blob as a file system, decided: what is in it, where its bytes are, how to get at a part.
//! Pure: bytes in, values out; no I/O, no clock.

pub mod build;
pub mod chunk;
pub mod codec;
pub mod erofs;
pub mod index;
pub mod tar;
pub mod toc;
pub mod tree;
