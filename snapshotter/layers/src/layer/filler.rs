//! What puts a layer's bytes where the kernel is about to read.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use super::Layer;
use super::open::{LayerContent, Open};
use crate::fuse::Content as _;
use crate::fuse::answer::Leaving;
use crate::layers::Shared;
use crate::mount::prefill::Filler;
use crate::turns::Share;

/// The bytes behind a mount that the kernel serves.
pub struct LayerFiller {
    content: LayerContent,
    runtime: Handle,
    share: Share,
    leaving: Leaving,
}

impl Open {
    /// What fills the data file for a mount of `layer` by the kernel.
    pub fn filler(&self, layer: &Layer, shared: &Shared) -> Arc<dyn Filler> {
        Arc::new(LayerFiller {
            content: self.content(layer, shared),
            runtime: shared.runtime.clone(),
            share: shared.places.share(),
            leaving: shared.leaving.clone(),
        })
    }
}

impl LayerFiller {
    async fn get(&self, range: Range<u64>) -> bool {
        let started = Instant::now();
        let Some(_place) = self.share.take().await else { return false };
        let ensured = self.content.ensure(std::slice::from_ref(&range)).await;
        self.content.waited(started.elapsed());
        match ensured {
            Ok(()) => self.content.has(&range),
            Err(error) => {
                if !self.leaving.has_begun() {
                    self.content.tell(format_args!("data {range:?}"), &error);
                }
                false
            }
        }
    }
}

impl Filler for LayerFiller {
    fn file(&self) -> &File {
        self.content.file()
    }

    fn has(&self, range: &Range<u64>) -> bool {
        self.content.asked();
        self.content.has(range)
    }

    fn fill(self: Arc<Self>, range: Range<u64>, done: Box<dyn FnOnce(bool) + Send>) {
        let runtime = self.runtime.clone();
        runtime.spawn(async move { done(self.get(range).await) });
    }
}
