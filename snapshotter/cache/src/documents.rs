//! Manifests, image indexes and configurations, whole, by digest: for this node and for others.
//!
//! Owns: the files in `documents-v1/`, their bound, the order in which they are dropped.
//! Does not own: who may read them from this node; it remembers what it was told about that.
//!
//! `documents-v1/<sha256 hex>`: a line `skimmer-document <n>`, the names of `n` scopes
//! ([`Scope::name`]), each ended by a line feed, and then the document's bytes up to the file's end.
//! The modification time is that of the last use. Files `*.tmp` are left-overs.
//!
//! Invariants:
//! - What [`Documents::get`] gives matches its digest; a damaged file is dropped.
//! - There are never more than [`MAX_DOCUMENTS`], nor more than [`MAX_BYTES`] of them.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::{self, BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use skimmer_proto::{Digest, Scope};

use crate::disk;

/// The largest document, in bytes: containerd's own limit.
pub const MAX_DOCUMENT: usize = 8 << 20;
pub const MAX_DOCUMENTS: usize = 4096;
pub const MAX_BYTES: u64 = 128 << 20;
/// Scopes that a document is remembered for.
const MAX_SCOPES: usize = 64;
const MAGIC: &str = "skimmer-document ";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("list the documents in {}", dir.display())]
    List { dir: PathBuf, source: io::Error },
    #[error("read document {digest}")]
    Read { digest: Digest, source: io::Error },
    #[error("keep document {digest}")]
    Write { digest: Digest, source: io::Error },
    #[error("drop document {digest}")]
    Drop { digest: Digest, source: io::Error },
    #[error("document {digest} has {len} bytes; the most supported is {MAX_DOCUMENT}")]
    TooLong { digest: Digest, len: usize },
    #[error("the bytes of document {digest} don't match it")]
    Mismatch { digest: Digest },
}

/// A document that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    pub digest: Digest,
    /// In bytes.
    pub len: u64,
    /// Under which rights its bytes came here.
    pub scopes: BTreeSet<Scope>,
}

/// See the module's documentation. All calls block briefly.
#[derive(Debug)]
pub struct Documents {
    dir: PathBuf,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    kept: HashMap<Digest, (Kept, SystemTime)>,
    bytes: u64,
}

impl Documents {
    /// Opens `dir`, which is made if it isn't there. Reads the head of each file.
    pub fn open(dir: PathBuf) -> Result<Self, Error> {
        let known = scan(&dir).map_err(|source| Error::List { dir: dir.clone(), source })?;
        Ok(Self { dir, known: Mutex::new(known) })
    }

    /// Bytes of all documents.
    pub fn bytes(&self) -> u64 {
        self.known().bytes
    }

    /// Keeps a document, which came under the rights of `scope` if there is one. What had to go for
    /// it, the least recently used first, is returned.
    pub fn put(
        &self,
        digest: Digest,
        bytes: &[u8],
        scope: Option<&Scope>,
    ) -> Result<Vec<Kept>, Error> {
        if bytes.len() > MAX_DOCUMENT {
            return Err(Error::TooLong { digest, len: bytes.len() });
        }
        if Digest::of(bytes) != digest {
            return Err(Error::Mismatch { digest });
        }
        let mut known = self.known();
        let before = known.kept.get(&digest).map(|(kept, _)| kept.scopes.clone());
        let mut scopes = before.clone().unwrap_or_default();
        let named = scope.filter(|scope| !scope.name().contains('\n') && scopes.len() < MAX_SCOPES);
        scopes.extend(named.cloned());
        if before.as_ref() != Some(&scopes) {
            let file = encode(&scopes, bytes);
            disk::write_atomically(&self.dir, &digest.hex(), &file)
                .map_err(|source| Error::Write { digest, source })?;
        }
        let kept = Kept { digest, len: bytes.len() as u64, scopes };
        known.add(kept, SystemTime::now());
        let mut gone = Vec::new();
        while known.is_over()
            && let Some(oldest) = known.oldest(digest)
        {
            gone.extend(self.remove(&mut known, oldest)?);
        }
        Ok(gone)
    }

    /// The document and the scopes that it came in, if it is here.
    pub fn get(&self, digest: Digest) -> Result<Option<(Bytes, BTreeSet<Scope>)>, Error> {
        let mut known = self.known();
        let Some((kept, used)) = known.kept.get_mut(&digest) else { return Ok(None) };
        *used = SystemTime::now();
        let scopes = kept.scopes.clone();
        let path = self.dir.join(digest.hex());
        let file = disk::read_optional(&path).map_err(|source| Error::Read { digest, source })?;
        let bytes = file.and_then(|file| decode(file).map(|(_, bytes)| bytes));
        let right = bytes.filter(|bytes| Digest::of(bytes) == digest);
        if right.is_none() {
            self.remove(&mut known, digest)?;
        } else if let Err(error) = disk::touch(&path) {
            tracing::debug!(%digest, %error, "last use not noted");
        }
        Ok(right.map(|bytes| (bytes, scopes)))
    }

    pub fn list(&self) -> Vec<Kept> {
        self.known().kept.values().map(|(kept, _)| kept.clone()).collect()
    }

    fn remove(&self, known: &mut Known, digest: Digest) -> Result<Option<Kept>, Error> {
        let removed = disk::remove(&self.dir.join(digest.hex()));
        removed.map_err(|source| Error::Drop { digest, source })?;
        Ok(known.drop(&digest))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn add(&mut self, kept: Kept, used: SystemTime) {
        self.drop(&kept.digest);
        self.bytes += kept.len;
        self.kept.insert(kept.digest, (kept, used));
    }

    fn drop(&mut self, digest: &Digest) -> Option<Kept> {
        let (kept, _) = self.kept.remove(digest)?;
        self.bytes -= kept.len;
        Some(kept)
    }

    fn is_over(&self) -> bool {
        self.kept.len() > MAX_DOCUMENTS || self.bytes > MAX_BYTES
    }

    /// The one to go first; not `spared`.
    fn oldest(&self, spared: Digest) -> Option<Digest> {
        let others = self.kept.iter().filter(|(digest, _)| **digest != spared);
        others.min_by_key(|(digest, (_, used))| (*used, **digest)).map(|(digest, _)| *digest)
    }
}

fn scan(dir: &Path) -> io::Result<Known> {
    fs::create_dir_all(dir)?;
    let mut known = Known::default();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let digest = format!("sha256:{name}").parse::<Digest>().ok();
        let head = digest.and_then(|_| read_head(&entry.path()).ok().flatten());
        match digest.zip(head) {
            Some((digest, (len, scopes, used))) => known.add(Kept { digest, len, scopes }, used),
            // Left over, or damaged.
            None => _ = disk::remove(&entry.path())?,
        }
    }
    Ok(known)
}

/// The document's length, its scopes and its last use.
fn read_head(path: &Path) -> io::Result<Option<(u64, BTreeSet<Scope>, SystemTime)>> {
    let file = fs::File::open(path)?;
    let metadata = file.metadata()?;
    let mut reader = io::BufReader::new(file.take(1 << 20));
    let Some((scopes, head)) = head(&mut reader)? else { return Ok(None) };
    let len = metadata.len().checked_sub(head).filter(|len| *len <= MAX_DOCUMENT as u64);
    Ok(len.map(|len| (len, scopes, metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH))))
}

/// The scopes, and how many bytes name them.
fn head(reader: &mut impl BufRead) -> io::Result<Option<(BTreeSet<Scope>, u64)>> {
    let mut line = String::new();
    let mut len = reader.read_line(&mut line)?;
    let count = line.strip_prefix(MAGIC).and_then(|rest| rest.trim_end().parse::<usize>().ok());
    let Some(count) = count.filter(|count| *count <= MAX_SCOPES) else { return Ok(None) };
    let mut scopes = BTreeSet::new();
    for _ in 0..count {
        line.clear();
        len += reader.read_line(&mut line)?;
        let Some(name) = line.strip_suffix('\n') else { return Ok(None) };
        scopes.insert(Scope::from_name(name));
    }
    Ok(Some((scopes, len as u64)))
}

fn encode(scopes: &BTreeSet<Scope>, bytes: &[u8]) -> Vec<u8> {
    let mut file = format!("{MAGIC}{}\n", scopes.len()).into_bytes();
    for scope in scopes {
        file.extend_from_slice(scope.name().as_bytes());
        file.push(b'\n');
    }
    file.extend_from_slice(bytes);
    file
}

fn decode(file: Vec<u8>) -> Option<(BTreeSet<Scope>, Bytes)> {
    let (scopes, len) = head(&mut file.as_slice()).ok()??;
    let len = usize::try_from(len).ok()?;
    Some((scopes, Bytes::from(file).slice(len..)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::*;

    fn repository(name: &str) -> Scope {
        Scope::Repository(name.to_owned())
    }

    #[test]
    fn what_is_kept_is_there_after_a_restart_with_its_scopes() {
        let dir = tempfile::tempdir().unwrap();
        let (text, other) = (b"{}\nskimmer-document 1\n".as_slice(), b"other".as_slice());
        let (a, b) = (Digest::of(text), Digest::of(other));
        let documents = Documents::open(dir.path().to_owned()).unwrap();
        documents.put(a, text, Some(&repository("r/a"))).unwrap();
        documents.put(a, text, Some(&Scope::Public)).unwrap();
        documents.put(b, other, None).unwrap();
        fs::write(dir.path().join("left-over.tmp"), "x").unwrap();
        drop(documents);

        let documents = Documents::open(dir.path().to_owned()).unwrap();
        let scopes = BTreeSet::from([Scope::Public, repository("r/a")]);
        assert_eq!(documents.get(a).unwrap(), Some((Bytes::from_static(text), scopes.clone())));
        let (bytes, none) = documents.get(b).unwrap().unwrap();
        assert_eq!((&bytes[..], none.len()), (other, 0));
        assert_eq!(documents.get(Digest::of(b"absent")).unwrap(), None);
        assert_eq!(documents.list().len(), 2);
        assert!(documents.list().contains(&Kept { digest: a, len: text.len() as u64, scopes }));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left over");
    }

    #[test]
    fn what_does_not_match_is_refused_or_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Documents::open(dir.path().to_owned()).unwrap();
        let digest = Digest::of(b"right");
        let error = documents.put(digest, b"wrong", None).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        let long = vec![0; MAX_DOCUMENT + 1];
        let error = documents.put(Digest::of(&long), &long, None).unwrap_err();
        assert!(matches!(error, Error::TooLong { .. }), "{error}");
        documents.put(digest, b"right", None).unwrap();
        fs::write(dir.path().join(digest.hex()), "skimmer-document 0\nwrong").unwrap();
        assert_eq!(documents.get(digest).unwrap(), None);
        assert_eq!(documents.list(), []);
        assert!(!dir.path().join(digest.hex()).exists());
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let documents = Documents::open(dir.path().to_owned()).unwrap();
        let large = |n: u8| vec![n; MAX_DOCUMENT];
        let fit = u8::try_from(MAX_BYTES / MAX_DOCUMENT as u64).unwrap();
        for n in 0..fit {
            assert_eq!(documents.put(Digest::of(&large(n)), &large(n), None).unwrap(), []);
        }
        documents.get(Digest::of(&large(0))).unwrap().unwrap();
        let gone = documents.put(Digest::of(b"one more"), b"one more", None).unwrap();
        let gone: Vec<Digest> = gone.iter().map(|kept| kept.digest).collect();
        assert_eq!(gone, [Digest::of(&large(1))]);
    }

    proptest! {
        #[test]
        fn arbitrary_files_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), count in 0..70_u8) {
            let _ = decode(bytes.clone());
            let mut file = format!("{MAGIC}{count}\n").into_bytes();
            file.extend_from_slice(&bytes);
            let _ = decode(file);
        }
    }
}
