//! Where other nodes listen, by the latest word; kept on disk, so that a node that starts without a
//! scheduler knows whom to ask.
//!
//! The file: a line `skimmer-peers-v1`, then a line for each peer, the one heard of last in front: its
//! id, and its multiaddrs, with spaces between. What can't be read is passed over.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use skimmer_identity::PeerId;

const HEAD: &str = "skimmer-peers-v1";
/// Peers remembered; those not heard of for longest go.
pub const PEERS: usize = 4096;
/// Of one peer.
const ADDRESSES: usize = 16;
const ADDRESS_BYTES: usize = 256;

#[derive(Debug)]
pub struct Book {
    path: Option<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Each with when it was heard of last, counted.
    peers: HashMap<PeerId, (Vec<String>, u64)>,
    count: u64,
    /// Nobody was told of these yet.
    new: Vec<PeerId>,
    /// Something is not on disk.
    changed: bool,
}

impl Book {
    /// With what `path` holds, if there is one.
    pub fn open(path: Option<PathBuf>) -> Self {
        let book = Self { path, known: Mutex::default() };
        let text = match book.path.as_deref().map(fs::read_to_string) {
            Some(Ok(text)) => text,
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                tracing::info!(%error, "the peers of before are not known");
                return book;
            }
            _ => return book,
        };
        let mut lines = text.lines();
        if lines.next() == Some(HEAD) {
            let read: Vec<_> = lines.take(PEERS).filter_map(read).collect();
            for (peer, addresses) in read.into_iter().rev() {
                book.note(peer, addresses);
            }
            book.lock().changed = false;
        }
        book
    }

    pub fn addresses(&self, peer: &PeerId) -> Vec<String> {
        self.lock().peers.get(peer).map(|(addresses, _)| addresses.clone()).unwrap_or_default()
    }

    pub fn note(&self, peer: PeerId, mut addresses: Vec<String>) {
        let fits = |address: &String| {
            (1..=ADDRESS_BYTES).contains(&address.len()) && !address.contains(char::is_whitespace)
        };
        addresses.retain(fits);
        addresses.truncate(ADDRESSES);
        if addresses.is_empty() {
            return;
        }
        let mut known = self.lock();
        known.count += 1;
        let count = known.count;
        match known.peers.insert(peer, (addresses.clone(), count)) {
            Some((before, _)) => known.changed |= before != addresses,
            None => {
                known.changed = true;
                known.new.push(peer);
            }
        }
        if known.peers.len() > PEERS {
            let oldest = known.peers.iter().min_by_key(|(_, (_, heard))| *heard);
            if let Some(oldest) = oldest.map(|(peer, _)| *peer) {
                known.peers.remove(&oldest);
                known.new.retain(|peer| *peer != oldest);
            }
        }
    }

    /// Peers that have become known since this was last asked.
    pub fn take_new(&self) -> Vec<PeerId> {
        std::mem::take(&mut self.lock().new)
    }

    /// Brings to disk what isn't there. Blocks.
    pub fn save(&self) {
        let Some(path) = &self.path else { return };
        let text = {
            let mut known = self.lock();
            if !std::mem::take(&mut known.changed) {
                return;
            }
            write(&known)
        };
        if let Err(error) = replace(path, &text) {
            tracing::info!(%error, path = %path.display(), "the peers are not remembered");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn write(known: &Known) -> String {
    let mut peers: Vec<_> = known.peers.iter().collect();
    peers.sort_by_key(|(_, (_, heard))| std::cmp::Reverse(*heard));
    let line = |(peer, (addresses, _)): (&PeerId, &(Vec<String>, u64))| {
        format!("{} {}\n", peer, addresses.join(" "))
    };
    let lines: String = peers.into_iter().map(line).collect();
    format!("{HEAD}\n{lines}")
}

fn read(line: &str) -> Option<(PeerId, Vec<String>)> {
    let mut words = line.split(' ');
    Some((words.next()?.parse().ok()?, words.map(str::to_owned).collect()))
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u32) -> PeerId {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&n.to_le_bytes());
        PeerId::from_public_key(key)
    }

    fn at(n: u32) -> Vec<String> {
        vec![format!("/ip4/10.0.0.1/tcp/{n}")]
    }

    #[test]
    fn it_is_the_same_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peers");
        let book = Book::open(Some(path.clone()));
        assert!(book.take_new().is_empty());
        book.note(peer(1), at(1));
        book.note(peer(2), [at(2), vec!["no multiaddr".to_owned()]].concat());
        book.note(peer(3), Vec::new());
        book.note(peer(1), at(7));
        assert_eq!(book.take_new(), [peer(1), peer(2)]);
        book.save();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}not a peer\n")).unwrap();
        let again = Book::open(Some(path));
        assert_eq!((again.addresses(&peer(1)), again.addresses(&peer(2))), (at(7), at(2)));
        assert_eq!(again.take_new(), [peer(2), peer(1)], "the one heard of last comes last");
        assert_eq!(again.addresses(&peer(3)), Vec::<String>::new());
    }

    #[test]
    fn it_is_bounded_and_forgets_who_was_not_heard_of_for_longest() {
        let book = Book::open(None);
        let most = u32::try_from(PEERS).unwrap();
        for n in 0..=most {
            book.note(peer(n), at(n));
            if n == 1 {
                book.note(peer(0), at(0));
            }
        }
        assert_eq!(book.lock().peers.len(), PEERS);
        assert_eq!((book.addresses(&peer(0)), book.addresses(&peer(1))), (at(0), Vec::new()));
        assert_eq!(book.take_new().len(), PEERS);
    }
}
