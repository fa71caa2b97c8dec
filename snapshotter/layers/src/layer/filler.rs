//! What puts a layer's bytes where the kernel is about to read.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// How long a reader may wait, for its turn and for bytes.
    deadline: Duration,
    runtime: Handle,
    share: Share,
    leaving: Leaving,
}

impl Open {
    /// What fills the data file for a mount of `layer` by the kernel.
    pub fn filler(&self, layer: &Layer, shared: &Shared) -> Arc<dyn Filler> {
        Arc::new(LayerFiller {
            content: self.content(layer, shared),
            deadline: shared.config.deadline,
            runtime: shared.runtime.clone(),
            share: shared.places.share(),
            leaving: shared.leaving.clone(),
        })
    }
}

impl LayerFiller {
    /// Gets what was asked for when it `arrived`; whether it is there now.
    async fn get(&self, range: Range<u64>, arrived: Instant) -> bool {
        let until = arrived + self.deadline;
        let _place = match self.share.take_until(until).await {
            Ok(place) => place,
            Err(error) => {
                self.content.waited(arrived.elapsed());
                // Others may have waited for the same bytes.
                return self.content.has(&range) || self.fail(&range, &error);
            }
        };
        let ensured = self.content.ensure(std::slice::from_ref(&range), until).await;
        self.content.waited(arrived.elapsed());
        match ensured {
            Ok(()) => self.content.has(&range),
            Err(error) => self.fail(&range, &error),
        }
    }

    /// The range is not there.
    fn fail(&self, range: &Range<u64>, error: &(dyn std::error::Error + 'static)) -> bool {
        if !self.leaving.has_begun() {
            self.content.tell(format_args!("data {range:?}"), error);
        }
        false
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
        let (runtime, arrived) = (self.runtime.clone(), Instant::now());
        runtime.spawn(async move { done(self.get(range, arrived).await) });
    }
}
