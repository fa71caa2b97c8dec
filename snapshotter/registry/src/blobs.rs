//! A range of a blob as a stream: opened, resumed where it broke, moved to another endpoint.
//!
//! Owns: the transfer of one range. Nothing outside the range is ever handed on, and no more than the
//! range is read from an answer; whether the bytes are right is for the caller to verify.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ETAG, HeaderMap, HeaderValue, IF_RANGE, RANGE};
use skimmer_cache::source::{BlobRef, Class};
use tokio::time::Instant;

use crate::http::{Answer, Ask, Error, Http};
use crate::range;
use crate::tries::{Candidate, Tries};

/// So much in one go is progress: failures before it are forgotten. Less isn't, or a server that gives
/// a byte per connection could keep us for ever.
const PROGRESS_BYTES: u64 = 64 << 10;
/// A server that doesn't end its answer by then loses the connection.
const END_OF_BODY: Duration = Duration::from_millis(20);

pub struct Transfer {
    http: Arc<Http>,
    digest: String,
    blob_len: u64,
    range: Range<u64>,
    class: Class,
    tries: Tries,
    body: Option<Body>,
    /// Bytes since the last failure.
    progress: u64,
    /// The endpoint's strong ETag, for resuming.
    etag: Option<(Arc<Candidate>, HeaderValue)>,
    /// When the caller was last given something.
    paused: Instant,
}

/// An answer that is being read.
struct Body {
    answer: Answer,
    part: range::Part,
}

impl Transfer {
    pub fn new(
        http: Arc<Http>,
        blob: &BlobRef,
        range: Range<u64>,
        class: Class,
        tries: Tries,
    ) -> Self {
        Self {
            http,
            digest: blob.digest.to_string(),
            blob_len: blob.len,
            range,
            class,
            tries,
            body: None,
            progress: 0,
            etag: None,
            paused: Instant::now(),
        }
    }

    /// Gets the head of an answer that has the next bytes of the range.
    pub async fn open(&mut self) -> Result<(), Error> {
        while self.body.is_none() {
            match self.ask().await {
                Ok(body) => self.body = Some(body),
                Err(error) => self.tries.failed(error).await?,
            }
        }
        Ok(())
    }

    /// The next bytes; `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        self.tries.extend(self.paused.elapsed());
        let next = self.read().await;
        self.paused = Instant::now();
        next
    }

    async fn read(&mut self) -> Result<Option<Bytes>, Error> {
        while !self.range.is_empty() {
            self.open().await?;
            let Some(body) = &mut self.body else { continue };
            match body.next(self.tries.until()).await {
                Ok(bytes) => {
                    let len = bytes.len() as u64;
                    self.range.start += len;
                    self.progress += len;
                    if body.part.take == 0 {
                        self.body = None;
                    }
                    if self.progress >= PROGRESS_BYTES {
                        self.tries.succeeded();
                    }
                    return Ok(Some(bytes));
                }
                Err(error) => {
                    self.body = None;
                    self.progress = 0;
                    self.tries.failed(error).await?;
                }
            }
        }
        Ok(None)
    }

    /// Asks the current candidate for what is left of the range.
    async fn ask(&mut self) -> Result<Body, Error> {
        let candidate = self.tries.candidate();
        let ask = Ask {
            endpoint: &candidate.endpoint,
            repository: &candidate.origin.repository,
            path: &format!("{}/blobs/{}", candidate.origin.repository, self.digest),
            headers: self.headers(&candidate),
            class: self.class,
            immutable: true,
            until: self.tries.until(),
        };
        let answer = self.http.get(&ask).await?;
        let (status, headers) = (answer.response.status(), answer.response.headers());
        let part = range::check(&self.range, self.blob_len, status, headers);
        let part = part.map_err(|source| Error::Range { url: answer.url.clone(), source })?;
        if part.skip > 0 {
            tracing::info!(url = %answer.url, skip = part.skip, "the server ignores ranges");
        }
        let etag = headers.get(ETAG).filter(|tag| tag.as_bytes().starts_with(b"\""));
        self.etag = etag.map(|tag| (candidate, tag.clone()));
        Ok(Body { answer, part })
    }

    fn headers(&self, candidate: &Arc<Candidate>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if self.range == (0..self.blob_len) {
            return headers;
        }
        let range = format!("bytes={}-{}", self.range.start, self.range.end - 1);
        // Digits and a dash are always a legal header.
        if let Ok(range) = HeaderValue::from_str(&range) {
            headers.insert(RANGE, range);
        }
        if let Some((_, tag)) = self.etag.as_ref().filter(|(of, _)| Arc::ptr_eq(of, candidate)) {
            headers.insert(IF_RANGE, tag.clone());
        }
        headers
    }
}

impl Body {
    /// The next bytes of the part, at least one.
    async fn next(&mut self, until: Instant) -> Result<Bytes, Error> {
        loop {
            let missing = self.part.take;
            let chunk = self.answer.chunk(until).await?;
            let short = || Error::Short { url: self.answer.url.clone(), missing };
            let mut chunk = chunk.ok_or_else(short)?;
            let skip = chunk.len().min(usize::try_from(self.part.skip).unwrap_or(usize::MAX));
            let _ = chunk.split_to(skip);
            self.part.skip -= skip as u64;
            chunk.truncate(usize::try_from(self.part.take).unwrap_or(usize::MAX));
            self.part.take -= chunk.len() as u64;
            if self.part.take == 0 {
                // Seeing the end of the body gives the connection back before the next request.
                let _ = tokio::time::timeout(END_OF_BODY, self.answer.response.chunk()).await;
            }
            if !chunk.is_empty() {
                return Ok(chunk);
            }
        }
    }
}

/// The time that `len` bytes need on a slow line, beside the deadline.
pub fn more_time(len: u64) -> Duration {
    const SLOW_LINE_BYTES_PER_SECOND: u64 = 64 << 10;
    Duration::from_secs(len / SLOW_LINE_BYTES_PER_SECOND)
}
