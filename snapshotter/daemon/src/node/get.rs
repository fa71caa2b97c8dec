//! `skimmer get`: a file at an HTTP(S) address, by way of the cache and the swarm if it may be shared.
//!
//! A file is shared under the digest that the caller gave, or else under a key made of its address and
//! its strong validator ([`Address::key`]); if there is neither, or the address holds credentials, it
//! comes straight from its origin and isn't kept.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use skimmer_cache::{Blame, Blob, BlobKind, BlobRef, Cache, Class};
use skimmer_proto::node::get_part::Part;
use skimmer_proto::node::{GetBytes, GetEnd, GetHead, GetPart, GetRequest};
use skimmer_proto::piece_table::piece_value;
use skimmer_proto::{Digest, PieceTable};
use skimmer_registry::Registry;
use skimmer_registry::files::{self, Address, Download, Found};
use skimmer_swarm::Swarm;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert::words;
use super::{Answers, blocking};

/// Parts that wait for their reader.
const QUEUED: usize = 4;
/// Bytes of a range at a time.
const STEP: u64 = 1 << 20;
/// How often a file is had before it is believed that its origin serves another.
const ATTEMPTS: u32 = 2;

#[derive(Clone)]
pub struct Getter {
    pub cache: Cache,
    pub registry: Registry,
    pub swarm: Option<Swarm>,
}

/// How a file is had.
enum Way {
    Shared { blob: Arc<Blob>, digest: Option<Digest>, validator: String },
    Direct { found: Found, why: &'static str },
}

type Sender = mpsc::Sender<Result<GetPart, Status>>;

impl Getter {
    pub async fn get(self, request: GetRequest) -> Result<Answers<GetPart>, Status> {
        let address = Address::parse(&request.url).map_err(|error| status(&error))?;
        let digest = match request.digest.as_str() {
            "" => None,
            text => Some(super::digest(text)?),
        };
        let way = self.way(&address, digest, request.direct).await?;
        let (sender, receiver) = mpsc::channel(QUEUED);
        let wanted = Wanted::of(&request);
        match way {
            Way::Shared { blob, digest, validator } => {
                let file = Shared { blob, digest, validator, host: address.plain().to_string() };
                wanted.check(&file.host, file.blob.len())?;
                tokio::spawn(async move { file.send(wanted, &sender).await });
            }
            Way::Direct { found, why } => {
                let (head, download) = self.direct(&address, &found, wanted, why).await?;
                tokio::spawn(async move { pass_on(head, download, &sender).await });
            }
        }
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }

    async fn way(
        &self,
        address: &Address,
        digest: Option<Digest>,
        direct: bool,
    ) -> Result<Way, Status> {
        if let Some(digest) = digest
            && let Some(blob) = self.held(digest).await?
        {
            return Ok(Way::Shared { blob, digest: Some(digest), validator: digest.to_string() });
        }
        if let Some(digest) = digest
            && !direct
            && !address.has_credentials()
            && let Some(len) = self.known_len(digest).await
        {
            return self.known(address, digest, len).await;
        }
        let found = self.registry.files().find(address).await.map_err(|error| status(&error))?;
        if let Some(why) = why_not(address, &found, digest, direct) {
            return Ok(Way::Direct { found, why });
        }
        let validator = found.validator.filter(|_| digest.is_none());
        let origin = self.registry.files().name(address, validator.as_deref());
        let key = validator.as_ref().map(|validator| address.key(validator));
        let (Some(key), Some(len)) = (digest.or(key), found.len) else {
            return Err(Status::internal("a file that can't be named was to be shared"));
        };
        let blob =
            self.open(BlobRef { digest: key, len, kind: BlobKind::Blob, origins: vec![origin] });
        let validator = digest.map(|digest| digest.to_string()).or(validator).unwrap_or_default();
        Ok(Way::Shared { blob: blob.await?, digest, validator })
    }

    /// What is here whole and verified takes no network.
    async fn held(&self, digest: Digest) -> Result<Option<Arc<Blob>>, Status> {
        let cache = self.cache.clone();
        let held = blocking(move || cache.held(digest)).await?;
        let held = held.map_err(|error| Status::internal(words(&error)))?;
        Ok(held.map(|held| held.blob).filter(|blob| blob.is_verified()))
    }

    /// Of a file that other nodes have.
    async fn known_len(&self, digest: Digest) -> Option<u64> {
        self.swarm.as_ref()?.find_len(digest).await
    }

    /// Other nodes have it, so nothing need be asked of its origin, which may be down.
    async fn known(&self, address: &Address, digest: Digest, len: u64) -> Result<Way, Status> {
        let origin = self.registry.files().name(address, None);
        let blob = BlobRef { digest, len, kind: BlobKind::Blob, origins: vec![origin] };
        let (blob, validator) = (self.open(blob).await?, digest.to_string());
        Ok(Way::Shared { blob, digest: Some(digest), validator })
    }

    async fn open(&self, blob: BlobRef) -> Result<Arc<Blob>, Status> {
        let cache = self.cache.clone();
        let opened = blocking(move || cache.blob(blob)).await?;
        opened.map_err(|error| Status::failed_precondition(words(&error)))
    }

    async fn direct(
        &self,
        address: &Address,
        found: &Found,
        wanted: Wanted,
        why: &str,
    ) -> Result<(GetHead, Download), Status> {
        let validator = found.validator.clone().unwrap_or_default();
        wanted.check(&address.plain().to_string(), found.len.unwrap_or(u64::MAX))?;
        let is_short = |range: &Range<u64>| found.len.is_some_and(|len| range.start >= len);
        let goes_on = wanted.validator.as_ref().is_none_or(|known| *known == validator)
            && !wanted.range.as_ref().is_some_and(is_short);
        let range = wanted.range.filter(|range| goes_on && *range != (0..u64::MAX));
        if range.is_some() && !found.ranges {
            if wanted.validator.is_none() {
                let text = format!("{} serves no ranges", address.plain());
                return Err(Status::failed_precondition(text));
            }
            return Box::pin(self.direct(address, found, Wanted::all(), why)).await;
        }
        let tag = Some(validator.as_str()).filter(|tag| !tag.is_empty());
        let opened = self.registry.files().stream(address, range.clone(), tag).await;
        let (partial, download) = opened.map_err(|error| status(&error))?;
        let start = range.filter(|_| partial).map_or(0, |range| range.start);
        let end = download.body_len().map_or(0, |len| start + len);
        Ok((GetHead { start, end, validator, shared: false, why: why.to_owned() }, download))
    }
}

/// Which bytes a caller wants.
struct Wanted {
    /// `None`: all; an end of `u64::MAX`: to the file's.
    range: Option<Range<u64>>,
    /// Of the file that the caller has the beginning of.
    validator: Option<String>,
}

impl Wanted {
    const fn all() -> Self {
        Self { range: None, validator: None }
    }

    /// Whether a file of `len` bytes has them.
    fn check(&self, host: &str, len: u64) -> Result<(), Status> {
        match &self.range {
            Some(range)
                if self.validator.is_none()
                    && (range.start >= len.max(1) || range.end <= range.start) =>
            {
                let text = format!("{host} has {len} bytes: there is nothing in the range");
                Err(Status::out_of_range(text))
            }
            _ => Ok(()),
        }
    }

    fn of(request: &GetRequest) -> Self {
        let end = if request.end == 0 { u64::MAX } else { request.end };
        let some = request.start > 0 || request.end > 0;
        let validator = Some(request.validator.clone()).filter(|text| !text.is_empty());
        Self { range: some.then_some(request.start..end), validator }
    }
}

/// Why a file comes straight from its origin.
fn why_not(
    address: &Address,
    found: &Found,
    digest: Option<Digest>,
    direct: bool,
) -> Option<&'static str> {
    let cases = [
        (direct, "it was asked for directly"),
        (address.has_credentials(), "its address holds credentials"),
        (found.len.is_none(), "the server doesn't say how long it is"),
        (!found.ranges, "the server serves no ranges of it"),
        (
            digest.is_none() && found.validator.is_none(),
            "neither a digest nor a strong ETag says what it is",
        ),
    ];
    cases.into_iter().find_map(|(is_so, why)| is_so.then_some(why))
}

/// A file in the cache.
struct Shared {
    blob: Arc<Blob>,
    /// `None`: no one knows what the whole has to be; its pieces are as their takers signed them.
    digest: Option<Digest>,
    validator: String,
    /// For messages.
    host: String,
}

impl Shared {
    /// A reader that goes away ends it; what has come by then is kept.
    async fn send(&self, wanted: Wanted, sender: &Sender) {
        let goes_on = wanted.validator.as_ref().is_some_and(|known| *known == self.validator);
        let sent = match wanted.range {
            Some(range) if wanted.validator.is_none() => self.send_range(range, sender).await,
            Some(range) if goes_on => self.send_whole(range.start, sender).await,
            _ => self.send_whole(0, sender).await,
        };
        if let Err(status) = sent {
            // The reader may have gone.
            let _ = sender.send(Err(status)).await;
        }
    }

    fn head(&self, range: Range<u64>) -> GetPart {
        let (start, end, validator) = (range.start, range.end, self.validator.clone());
        part(Part::Head(GetHead { start, end, validator, shared: true, why: String::new() }))
    }

    async fn send_whole(&self, from: u64, sender: &Sender) -> Result<(), Status> {
        let before = self.blob.fetched_via();
        let mut from = from;
        for attempt in 1..=ATTEMPTS {
            if sender.send(Ok(self.head(from..self.blob.len()))).await.is_err() {
                return Ok(());
            }
            let Some(outcome) = self.read(from, before, sender).await? else { return Ok(()) };
            match outcome {
                Outcome::Right | Outcome::Unknown => {
                    return self.end(matches!(outcome, Outcome::Right), before, sender).await;
                }
                Outcome::Wrong(got) => {
                    let distrusted = self.blob.distrust().await;
                    distrusted.map_err(|error| Status::internal(words(&error)))?;
                    let [_, swarm] = since(before, self.blob.fetched_via());
                    // What other nodes gave may be wrong: then it comes from the origin alone.
                    if attempt == ATTEMPTS || swarm == 0 {
                        let text = format!(
                            "{} is not {}: it has the digest {got}",
                            self.host, self.validator
                        );
                        return Err(Status::data_loss(text));
                    }
                    from = 0;
                }
            }
        }
        Ok(())
    }

    /// Reads it from end to end and sends what lies behind `from`; `None`: the reader has gone.
    async fn read(
        &self,
        from: u64,
        before: [u64; 2],
        sender: &Sender,
    ) -> Result<Option<Outcome>, Status> {
        let (blob, mut hash) = (&self.blob, Sha256::new());
        let (mut at, mut values) = (0, Vec::new());
        let mut pull = blob.pull_through(Class::PullThrough);
        loop {
            let next = pull.next().await;
            let Some(bytes) = next.map_err(|error| fetch_status(&error))? else { break };
            let piece = u32::try_from(values.len()).unwrap_or(u32::MAX);
            let (geometry, summed) = (blob.geometry(), bytes.clone());
            let known = self.digest.is_some();
            let value;
            (hash, value) = blocking(move || {
                if known {
                    hash.update(&summed);
                }
                (hash, piece_value(geometry, piece, &summed))
            })
            .await?;
            values.push(value);
            let skip = usize::try_from(from.saturating_sub(at)).unwrap_or(usize::MAX);
            at += bytes.len() as u64;
            let rest = bytes.slice(skip.min(bytes.len())..);
            if !rest.is_empty() && sender.send(Ok(self.data(rest, before))).await.is_err() {
                return Ok(None);
            }
        }
        let Some(digest) = self.digest else { return Ok(Some(Outcome::Unknown)) };
        let got = Digest::from_bytes(hash.finalize().into());
        if got != digest {
            return Ok(Some(Outcome::Wrong(got)));
        }
        if !blob.is_verified() {
            // There is no layer: what it would decode to is the file itself.
            let table = PieceTable::new(blob.geometry(), digest, digest, digest, values);
            let table = table.map_err(|error| Status::internal(words(&error)))?;
            blob.prove(table).map_err(|error| Status::internal(words(&error)))?;
        }
        Ok(Some(Outcome::Right))
    }

    async fn send_range(&self, range: Range<u64>, sender: &Sender) -> Result<(), Status> {
        let (blob, before) = (&self.blob, self.blob.fetched_via());
        let range = range.start..range.end.min(blob.len());
        if sender.send(Ok(self.head(range.clone()))).await.is_err() {
            return Ok(());
        }
        let mut at = range.start;
        while at < range.end {
            let step = at..range.end.min(at + STEP);
            let ensured = blob.ensure_unverified(step.clone(), Class::PullThrough).await;
            ensured.map_err(|error| fetch_status(&error))?;
            let (reading, len) = (Arc::clone(blob), step.end - step.start);
            let read = blocking(move || {
                let mut buffer = vec![0; usize::try_from(len).unwrap_or_default()];
                reading.read_at(&mut buffer, step.start).map(|()| Bytes::from(buffer))
            });
            let bytes = read.await?.map_err(|error| Status::internal(words(&error)))?;
            at += len;
            if sender.send(Ok(self.data(bytes, before))).await.is_err() {
                return Ok(());
            }
        }
        self.end(self.digest.is_some() && blob.is_verified(), before, sender).await
    }

    fn data(&self, data: Bytes, before: [u64; 2]) -> GetPart {
        let [origin_bytes, swarm_bytes] = since(before, self.blob.fetched_via());
        part(Part::Bytes(GetBytes { data: data.into(), origin_bytes, swarm_bytes }))
    }

    async fn end(&self, verified: bool, before: [u64; 2], sender: &Sender) -> Result<(), Status> {
        let [origin_bytes, swarm_bytes] = since(before, self.blob.fetched_via());
        // The reader may have gone.
        let _ =
            sender.send(Ok(part(Part::End(GetEnd { verified, origin_bytes, swarm_bytes })))).await;
        Ok(())
    }
}

/// What a whole file turned out to be.
enum Outcome {
    Right,
    Unknown,
    Wrong(Digest),
}

/// Sends what comes, as it comes.
async fn pass_on(head: GetHead, mut download: Download, sender: &Sender) {
    let mut origin_bytes = 0;
    let mut next = Ok(Some(part(Part::Head(head))));
    while let Ok(Some(message)) = next {
        if sender.send(Ok(message)).await.is_err() {
            return;
        }
        next = download.next().await.map(|bytes| {
            bytes.map(|data| {
                origin_bytes += data.len() as u64;
                part(Part::Bytes(GetBytes { data: data.into(), origin_bytes, swarm_bytes: 0 }))
            })
        });
    }
    let end = GetEnd { verified: false, origin_bytes, swarm_bytes: 0 };
    let last = next.map(|_| part(Part::End(end))).map_err(|error| status(&error));
    // The reader may have gone.
    let _ = sender.send(last).await;
}

const fn part(part: Part) -> GetPart {
    GetPart { part: Some(part) }
}

fn since(before: [u64; 2], now: [u64; 2]) -> [u64; 2] {
    [now[0].saturating_sub(before[0]), now[1].saturating_sub(before[1])]
}

fn status(error: &files::Error) -> Status {
    let text = words(error);
    match error {
        files::Error::Address(_) => Status::invalid_argument(text),
        files::Error::Refused { .. } => Status::permission_denied(text),
        files::Error::Absent { .. } => Status::not_found(text),
        _ => Status::unavailable(text),
    }
}

fn fetch_status(error: &skimmer_cache::blob::Error) -> Status {
    let refused = error.fetch_error().is_some_and(|fetch| fetch.blame == Blame::Refused);
    let text = words(error);
    if refused { Status::permission_denied(text) } else { Status::unavailable(text) }
}
