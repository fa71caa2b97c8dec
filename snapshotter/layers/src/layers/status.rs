//! How a layer stands, for people.

use std::fs;
use std::sync::Arc;

use skimmer_cache::{Blob, Held, LayerObjects};
use skimmer_proto::Digest;

use super::{Layers, bundle};
use crate::layer::{Cause, Layer, LayerSpec};
use crate::mount::error_chain;
use crate::state::State;

/// How a layer's bytes are had at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is known of it on this node, or nobody uses it.
    Absent,
    /// It is being fetched whole.
    PullThrough,
    /// It can be mounted; bytes come when they are read.
    Lazy,
    /// Every byte is on disk and verified.
    Local,
    /// The last attempt failed; the next use tries again.
    Failed,
}

/// How a layer stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub digest: Digest,
    pub diff_id: Digest,
    pub media_type: String,
    /// Length of the blob.
    pub size: u64,
    pub mode: Mode,
    /// Length of the decoded layer; 0 while unknown.
    pub data_bytes: u64,
    /// Of these, on disk.
    pub data_bytes_present: u64,
    /// Bytes of the blob on disk.
    pub blob_bytes_present: u64,
    /// Bytes received since the blob was opened, in the order of [`skimmer_cache::Class::ALL`].
    pub fetched: [u64; 3],
    /// The same bytes, in the order of [`skimmer_cache::Via::ALL`].
    pub fetched_via: [u64; 2],
    /// Length of the encoded index; 0: there is none.
    pub index_bytes: u64,
    /// Why the last attempt failed.
    pub error: Option<String>,
    /// Whether the kernel serves it, and not this process; `None`: it isn't mounted.
    pub in_kernel: Option<bool>,
}

impl Layers {
    /// How the layer of `spec` stands, in use or not. To ask is no use of it, and makes nothing on disk. Blocks; reads
    /// the whole index of a layer that isn't in use.
    pub fn status(&self, spec: &LayerSpec) -> Result<Status, Cause> {
        let digest = spec.blob.digest;
        let in_use = self.get(digest).into_iter().find(|l| l.spec().diff_id == spec.diff_id);
        let mut status = blank(spec);
        if let Some(blob) = self.held(spec)? {
            status.blob_bytes_present = blob.bytes_present();
            (status.fetched, status.fetched_via) = (blob.fetched(), blob.fetched_via());
        }
        match in_use {
            Some(layer) => status.fill_in(&layer),
            None => self.look_up(&mut status)?,
        }
        Ok(status)
    }

    /// The blob of `spec`, if it is open or has bytes on disk.
    fn held(&self, spec: &LayerSpec) -> Result<Option<Arc<Blob>>, Cause> {
        let (digest, claimed) = (spec.blob.digest, spec.blob.len);
        let failed = |source| Cause::Blob { source };
        let held = self.shared().cache.peek(digest).map_err(failed)?;
        let Some(Held { blob, .. }) = held else { return Ok(None) };
        match blob.len() {
            known if known == claimed => Ok(Some(blob)),
            known if blob.is_verified() => {
                Err(failed(skimmer_cache::blob::Error::Length { digest, claimed, known }))
            }
            // It makes way as soon as this one is used.
            _ => Ok(None),
        }
    }

    /// What the disk knows of a layer that nobody uses.
    fn look_up(&self, status: &mut Status) -> Result<(), Cause> {
        let failed = |source| Cause::Files { source };
        // What is opened must not be evicted meanwhile: it would be made anew.
        let _pin = self.shared().cache.pin_layer_untouched(status.digest);
        let files = self.shared().cache.peek_layer(status.digest);
        let Some(LayerObjects { index, table }) = files.load().map_err(failed)? else {
            return Ok(());
        };
        let Ok(shown) = bundle::decode(table, index) else { return Ok(()) };
        status.mode = Mode::Lazy;
        status.index_bytes = shown.encoded.len() as u64;
        status.data_bytes = shown.index.data_len;
        if fs::metadata(files.data_path()).is_ok_and(|data| data.len() == status.data_bytes) {
            let data = files.open_data(status.data_bytes, shown.index.chunks.len());
            let data = data.map_err(failed)?;
            status.data_bytes_present = data.present_bytes();
            if data.complete() && self.shared().is_proved(status.digest)? {
                status.mode = Mode::Local;
            }
        }
        Ok(())
    }
}

impl Status {
    fn fill_in(&mut self, layer: &Layer) {
        if let Some(open) = layer.opened() {
            self.data_bytes = open.fill.data().len();
            self.data_bytes_present = open.fill.data().present_bytes();
            self.index_bytes = open.index_bytes;
        }
        self.in_kernel = layer.is_in_kernel();
        self.mode = match layer.state() {
            State::Absent => Mode::Absent,
            State::Opening | State::PullThrough => Mode::PullThrough,
            State::Lazy => Mode::Lazy,
            State::Local => Mode::Local,
            State::Failed { error, .. } => {
                self.error = Some(error_chain(&*error));
                Mode::Failed
            }
        };
    }
}

fn blank(spec: &LayerSpec) -> Status {
    Status {
        digest: spec.blob.digest,
        diff_id: spec.diff_id,
        media_type: spec.media_type.clone(),
        size: spec.blob.len,
        mode: Mode::Absent,
        data_bytes: 0,
        data_bytes_present: 0,
        blob_bytes_present: 0,
        fetched: [0; 3],
        fetched_via: [0; 2],
        index_bytes: 0,
        error: None,
        in_kernel: None,
    }
}
