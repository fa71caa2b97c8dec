//! Looking for bytes on disk that are no longer right, and setting them right.
//!
//! Blobs are compared with their piece tables, data files with what the blobs decode to; a complete
//! one whose DiffID still matches needs no more. Wrong pieces are forgotten. A wrong chunk is written
//! again in place if the blob's bytes of it are here; else it is forgotten, and fetched at once if the
//! layer is in use. Of a mounted layer the kernel then reads again what it has cached.
//!
//! Not checked: layers mounted by a table of contents, until they have an index of their own; data of
//! layers that nobody uses and whose blob has gone, unless complete.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use skimmer_cache::{Blob, Class, LayerData, LayerFiles, LayerObjects, Pin, Spans as _};
use skimmer_index::index::{LayerIndex, Layout};
use skimmer_proto::{Digest, PieceTable};

use super::Layers;
use crate::fill::{self, Fill, Mended, Proof};
use crate::layer::Layer;
use crate::mount::error_chain;

const STEP_BYTES: usize = 1 << 20;

/// Chunks that are looked at together where the whole is wrong: those that have to go cost one checkpoint.
const RUN: usize = 64;

/// How long a chunk of the blob may take to come, in the background and then before anything else, until the data that it
/// would be compared with is given up.
const SOURCE_WAIT: Duration = Duration::from_secs(10);

/// How often the removal of wrong data is tried while somebody has it open, and the pause in between.
const ATTEMPTS: u32 = 5;
const ATTEMPT_PAUSE: Duration = Duration::from_secs(1);

/// What a check of one digest found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Read and compared.
    pub bytes: u64,
    /// Pieces of the blob that were wrong, and have been forgotten.
    pub pieces: u64,
    /// Chunks of the data file that were wrong.
    pub chunks: u64,
    /// Of these, written again; the others have been forgotten.
    pub rewritten: u64,
    /// Index, piece table or inodes that were damaged.
    pub objects: u64,
}

/// Why something could not be checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("check the blob {blob}")]
    Blob { blob: Digest, source: Box<skimmer_cache::blob::Error> },
    #[error("open the files of layer {blob}")]
    Files { blob: Digest, source: Box<skimmer_cache::layer::Error> },
    #[error("read the data file of layer {blob}")]
    Data { blob: Digest, source: io::Error },
    #[error("check a chunk of layer {blob}")]
    Chunk { blob: Digest, source: Box<fill::Error> },
}

/// Told of bytes read; it pauses, and may end the check.
pub type Pause<'a> = dyn FnMut(u64) -> ControlFlow<()> + 'a;

/// A layer's data, as it is being checked.
struct Subject<'a> {
    layers: &'a Layers,
    blob: Digest,
    fill: Arc<Fill>,
    table: PieceTable,
    files: Arc<LayerFiles>,
    /// The layer was in use when the check began.
    in_use: bool,
    /// The background's turn didn't come once: it isn't waited for again.
    is_busy: Cell<bool>,
    /// The blob's bytes don't come any more: nothing else is waited for.
    is_cut_off: Cell<bool>,
    /// Layers that were local until this check.
    lost: RefCell<Vec<Arc<Layer>>>,
}

impl Layers {
    /// Checks what is on disk of `blob` and of its layer, and sets right what can be. Blocks: for a
    /// thread that isn't one of the runtime's workers.
    pub fn check(&self, blob: Digest, pause: &mut Pause<'_>) -> Result<Checked, Error> {
        let mut checked = Checked::default();
        let failed = |source| Error::Blob { blob, source: Box::new(source) };
        if let Some(held) = self.shared().cache.peek(blob).map_err(failed)? {
            let rot = held.blob.check(held.table.as_ref(), pause).map_err(failed)?;
            checked.bytes += rot.bytes;
            checked.pieces = rot.wrong.len() as u64;
        }
        self.check_layer(blob, &mut checked, pause)?;
        self.tell(blob, &checked);
        Ok(checked)
    }

    fn tell(&self, blob: Digest, checked: &Checked) {
        let metrics = &self.shared().metrics;
        let Checked { bytes, pieces, chunks, rewritten, objects } = *checked;
        metrics.checked_bytes.inc_by(bytes);
        metrics.rotten_pieces.inc_by(pieces);
        metrics.rotten_chunks.inc_by(chunks);
        metrics.rotten_objects.inc_by(objects);
        if pieces + chunks + objects > 0 {
            tracing::error!(%blob, pieces, chunks, rewritten, objects,
                "cached bytes had changed on disk; from now on they are not used");
        }
    }

    fn check_layer(
        &self,
        blob: Digest,
        checked: &mut Checked,
        pause: &mut Pause<'_>,
    ) -> Result<(), Error> {
        let shared = self.shared();
        if shared.mounts.has_left(blob) {
            // Somebody may be reading there whom nobody here knows of yet.
            return Ok(());
        }
        let cache = &shared.cache;
        let failed = |source| Error::Files { blob, source: Box::new(source) };
        let pin = cache.pin_layer_untouched(blob);
        let files = cache.peek_layer(blob);
        let open = self.get(blob).into_iter().find_map(|layer| layer.opened());
        let in_use = open.is_some();
        let wants = || in_use || !pin.is_only();
        let Some((table, index)) = objects(&files, wants, checked).map_err(failed)? else {
            return Ok(());
        };
        let fill = match open {
            Some(open) => {
                let known = open.fill.blob().table();
                if open.toc.is_some() || known.is_none_or(|known| *known != table) {
                    return Ok(());
                }
                Arc::clone(&open.fill)
            }
            None if !files.data_path().exists() => return Ok(()),
            None => {
                let data = files.open_data(index.data_len, index.chunks.len()).map_err(failed)?;
                let held = cache
                    .peek(blob)
                    .map_err(|source| Error::Blob { blob, source: Box::new(source) })?;
                let Some(held) = held.filter(|held| held.blob.geometry() == table.geometry) else {
                    let right = whole_is_right(blob, &data, &index, &table, checked, pause)?;
                    if right != Some(false) {
                        return Ok(());
                    }
                    let wrong = data.present() as u64;
                    drop(data);
                    for _ in 0..ATTEMPTS {
                        if self.give_up(blob, &files, &pin)? {
                            checked.chunks += wrong;
                            return Ok(());
                        }
                        // Somebody has begun to use it meanwhile, or looks at it for a moment.
                        if self.get(blob).iter().any(|layer| layer.opened().is_some()) {
                            drop(pin);
                            return self.check_layer(blob, checked, pause);
                        }
                        thread::sleep(ATTEMPT_PAUSE);
                    }
                    tracing::error!(%blob, "data that is wrong on disk is still being read by containers of a removed image");
                    return Ok(());
                };
                self.idle_fill(held.blob, data, index)
            }
        };
        let (is_busy, is_cut_off, lost) = Default::default();
        let layers = self;
        Subject { layers, blob, fill, table, files, in_use, is_busy, is_cut_off, lost }
            .check(checked, pause)
    }

    /// What decodes chunks of a layer that isn't open.
    fn idle_fill(&self, blob: Arc<Blob>, data: Arc<LayerData>, index: LayerIndex) -> Arc<Fill> {
        let shared = self.shared();
        Arc::new(Fill::new(
            blob,
            data,
            index,
            Proof::Pieces,
            shared.config.deadline,
            &shared.decoders,
            Arc::clone(&shared.metrics),
        ))
    }

    /// Nobody uses the layer and its data is wrong, nobody knows where. False: somebody uses it after all.
    fn give_up(&self, blob: Digest, files: &LayerFiles, pin: &Pin) -> Result<bool, Error> {
        self.shared().forget_proved(blob);
        let evicted = files.evict_data(|| !pin.is_only());
        evicted.map_err(|source| Error::Files { blob, source: Box::new(source) })
    }
}

impl Subject<'_> {
    fn check(&self, checked: &mut Checked, pause: &mut Pause<'_>) -> Result<(), Error> {
        let mut mended = Vec::new();
        let done = self.check_chunks(&mut mended, checked, pause);
        if !mended.is_empty() {
            self.users().iter().for_each(|layer| layer.read_again(&mended));
        }
        self.lose();
        // Not before: what is being completed is kept, right or wrong.
        self.lost.take().iter().for_each(Layer::complete_later);
        done
    }

    /// The layers that are read from this data: one that was opened since the check began, too.
    fn users(&self) -> Vec<Arc<Layer>> {
        let mut layers = self.layers.get(self.blob);
        layers.retain(|layer| {
            let open = layer.opened();
            open.is_some_and(|open| Arc::ptr_eq(open.fill.data(), self.fill.data()))
        });
        layers
    }

    /// If something of the data is missing, nobody takes it for local.
    fn lose(&self) {
        if !self.fill.data().complete() {
            let lost = self.users().into_iter().filter(Layer::lose);
            self.lost.borrow_mut().extend(lost);
        }
    }

    /// `mended`: parts of the data file that were wrong, and aren't any more.
    fn check_chunks(
        &self,
        mended: &mut Vec<Range<u64>>,
        checked: &mut Checked,
        pause: &mut Pause<'_>,
    ) -> Result<(), Error> {
        let (data, index) = (self.fill.data(), self.fill.index());
        let whole = whole_is_right(self.blob, data, index, &self.table, checked, pause)?;
        if whole == Some(true) {
            return Ok(());
        }
        let wrong = whole == Some(false);
        let failed = |source| Error::Chunk { blob: self.blob, source: Box::new(source) };
        let present: Vec<usize> = (0..data.chunks()).filter(|chunk| data.has(*chunk)).collect();
        let mut unlocated = false;
        // What fails for one chunk is no reason to leave others as they are; but if one can't be had, none can.
        let (mut had, mut compared) = (Ok(()), Ok(()));
        'all: for run in present.chunks(if wrong { RUN } else { 1 }) {
            let (known, unknown) = self.sort(run, wrong).map_err(failed)?;
            if wrong && !unknown.is_empty() {
                unlocated = true;
                had = had.and_then(|()| self.distrust(&unknown, mended, checked).map_err(failed));
            }
            for chunk in known {
                let span = &index.chunks[chunk].data;
                checked.bytes += span.end - span.start;
                let right = self.check_chunk(chunk, mended, checked).map_err(failed);
                compared = compared.and(right);
                if pause(span.end - span.start).is_break() {
                    break 'all;
                }
            }
        }
        if unlocated && !self.in_use {
            self.layers.shared().forget_proved(self.files.blob());
        }
        had.and(compared)
    }

    /// Of a chunk of which the blob's bytes are here.
    fn check_chunk(
        &self,
        chunk: usize,
        mended: &mut Vec<Range<u64>>,
        checked: &mut Checked,
    ) -> Result<(), fill::Error> {
        if !self.fill.is_right(chunk)? {
            mended.extend(self.mend(chunk, checked)?);
        }
        Ok(())
    }

    /// Of `run`, the chunks of which the blob's bytes are here, and the others. If the data is `wrong`
    /// somewhere, what is missing has to come first.
    fn sort(&self, run: &[usize], wrong: bool) -> Result<(Vec<usize>, Vec<usize>), fill::Error> {
        let (mut known, mut unknown) = (Vec::new(), Vec::new());
        for chunk in run {
            let is_known =
                self.fill.has_source(*chunk, &self.table)? || (wrong && self.comes(*chunk));
            let those = if is_known { &mut known } else { &mut unknown };
            those.push(*chunk);
        }
        Ok((known, unknown))
    }

    /// Whether the blob's bytes of `chunk`, which aren't here, come if they are asked for: only for a
    /// layer in use, and as long as any do. Wrong data isn't left in use for want of them.
    fn comes(&self, chunk: usize) -> bool {
        if !self.in_use || self.is_cut_off.get() {
            return false;
        }
        let comes_as = |class| {
            let fetch = self.fill.fetch(chunk, class);
            let fetched = async { tokio::time::timeout(SOURCE_WAIT, fetch).await };
            matches!(self.layers.shared().runtime.block_on(fetched), Ok(Ok(_)))
        };
        if !self.is_busy.get() {
            if comes_as(Class::Background) {
                return true;
            }
            self.is_busy.set(true);
        }
        let comes = comes_as(Class::Fault);
        self.is_cut_off.set(!comes);
        comes
    }

    /// Somewhere the data is wrong, and nothing says that it isn't in these chunks. They go together:
    /// readers wait meanwhile.
    fn distrust(
        &self,
        chunks: &[usize],
        mended: &mut Vec<Range<u64>>,
        checked: &mut Checked,
    ) -> Result<(), fill::Error> {
        if self.fill.distrust(chunks)? {
            checked.chunks += chunks.len() as u64;
            self.lose();
            chunks.iter().for_each(|chunk| self.fetch_again(*chunk));
            return Ok(());
        }
        for chunk in chunks {
            mended.extend(self.mend(*chunk, checked)?);
        }
        Ok(())
    }

    /// The parts of the data file that are right again; the others are when they have been fetched.
    fn mend(&self, chunk: usize, checked: &mut Checked) -> Result<Vec<Range<u64>>, fill::Error> {
        checked.chunks += 1;
        match self.fill.mend(chunk, &self.table, &self.layers.shared().runtime)? {
            Mended::Rewritten => {
                checked.rewritten += 1;
                Ok(self.fill.spans(chunk))
            }
            Mended::Forgotten => {
                self.fetch_again(chunk);
                Ok(Vec::new())
            }
        }
    }

    /// If the layer is in use, `chunk`, which has been forgotten, is fetched, and then read again.
    fn fetch_again(&self, chunk: usize) {
        let layers = self.users();
        if layers.is_empty() {
            return;
        }
        let (fill, parts) = (Arc::clone(&self.fill), self.fill.spans(chunk));
        self.layers.shared().runtime.spawn(async move {
            match fill.run(chunk..chunk + 1, Class::Background).await {
                Ok(()) => {
                    // It says itself what fails.
                    let read_again =
                        move || layers.iter().for_each(|layer| layer.read_again(&parts));
                    let _ = tokio::task::spawn_blocking(read_again).await;
                }
                Err(error) => {
                    let error = error_chain(&*error);
                    tracing::info!(chunk, error, "what was wrong comes when it is read");
                }
            }
        });
    }
}

/// The layer's stored table and index, with its inodes. What is damaged of them is set right or, if
/// nobody uses the layer or `wants` to, given up.
fn objects(
    files: &LayerFiles,
    wants: impl FnOnce() -> bool,
    checked: &mut Checked,
) -> Result<Option<(PieceTable, LayerIndex)>, skimmer_cache::layer::Error> {
    let found = files.load()?;
    let decoded = found.and_then(|LayerObjects { index, table }| {
        LayerIndex::decode(&index).ok().map(|decoded| (index, table, decoded))
    });
    let Some((encoded, table, index)) = decoded else {
        if files.has_objects() {
            checked.objects += 1;
            files.evict(wants)?;
        }
        return Ok(None);
    };
    if std::fs::read(files.inodes_path()).ok().as_ref() != Some(&index.inodes) {
        checked.objects += 1;
        files.store(&encoded, &table, &index.inodes)?;
    }
    checked.bytes += encoded.len() as u64 + index.inodes.len() as u64;
    Ok(Some((table, index)))
}

/// Whether a complete data file is what it was proved to be; `None` if that can't be said.
fn whole_is_right(
    blob: Digest,
    data: &LayerData,
    index: &LayerIndex,
    table: &PieceTable,
    checked: &mut Checked,
    pause: &mut Pause<'_>,
) -> Result<Option<bool>, Error> {
    if !data.complete() || index.layout != Layout::Tar {
        return Ok(None);
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; STEP_BYTES];
    let mut at = 0;
    while at < index.tar_len {
        let left = usize::try_from(index.tar_len - at).unwrap_or(usize::MAX);
        let step = &mut buffer[..left.min(STEP_BYTES)];
        let read = {
            let _hold = data.hold();
            data.file().read_exact_at(step, at)
        };
        if !fill::readable(read).map_err(|source| Error::Data { blob, source })? {
            return Ok(Some(false));
        }
        hash.update(&*step);
        at += step.len() as u64;
        checked.bytes += step.len() as u64;
        if pause(step.len() as u64).is_break() {
            return Ok(Some(true));
        }
    }
    if Digest::from_bytes(hash.finalize().into()) != table.diff_id {
        return Ok(Some(false));
    }
    let copies = index.copies.iter().map(|copy| fill::same_within(data.file(), *copy));
    let same = copies.collect::<io::Result<Vec<_>>>().map(|same| same.into_iter().all(|same| same));
    same.map(Some).map_err(|source| Error::Data { blob, source })
}
