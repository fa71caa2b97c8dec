//! What was told, in a file: the SHA-256 of the rest, the length of the rest, the rest in JSON.
//!
//! It is written in place. Who is killed meanwhile leaves something that doesn't match, which is nothing: what is lost
//! is told again with the next pull.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use skimmer_proto::Digest;

use super::Credential;

const DIGEST: usize = 32;
const HEAD: usize = DIGEST + size_of::<u64>();
/// More than what is kept takes.
const MOST_BYTES: u64 = 1 << 30;

#[derive(Serialize, Deserialize)]
pub struct Record {
    pub host: String,
    pub repository: String,
    #[serde(with = "Written")]
    pub credential: Credential,
    pub told_at: SystemTime,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Credential")]
enum Written {
    Password { username: String, secret: String },
    Identity(String),
    Bearer(String),
}

pub fn write(file: &File, records: &[Record]) -> io::Result<()> {
    let rest = serde_json::to_vec(records)?;
    let head = [&Digest::of(&rest).as_bytes()[..], &(rest.len() as u64).to_be_bytes()].concat();
    file.write_all_at(&rest, HEAD as u64)?;
    file.write_all_at(&head, 0)?;
    // What is forgotten isn't left behind.
    file.set_len((HEAD + rest.len()) as u64)
}

/// Nothing if there is nothing that can be read.
pub fn read(file: &File) -> Vec<Record> {
    let found = try_read(file).ok().flatten();
    found.unwrap_or_default()
}

fn try_read(file: &File) -> io::Result<Option<Vec<Record>>> {
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0)?;
    let (digest, len) = head.split_at(DIGEST);
    let len = len.try_into().map_or(u64::MAX, u64::from_be_bytes);
    if len > MOST_BYTES.min(file.metadata()?.len()) {
        return Ok(None);
    }
    let mut rest = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut rest, HEAD as u64)?;
    let is_whole = Digest::of(&rest).as_bytes()[..] == *digest;
    Ok(if is_whole { serde_json::from_slice(&rest).ok() } else { None })
}
