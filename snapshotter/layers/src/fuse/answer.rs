//! The answer to a read, owed until it is given.
//!
//! A reply of fuser's that is dropped answers EIO. When this process is about to end and somebody keeps its mounts, no
//! answer is the right one: the kernel asks the next process again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuser::{Errno, ReplyData};

/// Whether what is not answered yet is left to the next process. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Leaving(Arc<AtomicBool>);

impl Leaving {
    /// From now on nothing fails any more: what can't be answered isn't.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn has_begun(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// See the module's documentation.
pub struct Answer {
    reply: Option<ReplyData>,
    leaving: Leaving,
}

impl Answer {
    pub fn new(reply: ReplyData, leaving: &Leaving) -> Self {
        Self { reply: Some(reply), leaving: leaving.clone() }
    }

    pub fn data(mut self, bytes: &[u8]) {
        if let Some(reply) = self.reply.take() {
            reply.data(bytes);
        }
    }

    /// The read fails, unless it is left to the next process.
    pub fn error(mut self, errno: Errno) {
        if !self.is_left()
            && let Some(reply) = self.reply.take()
        {
            reply.error(errno);
        }
    }

    /// Whether a failure is nothing to tell anybody.
    pub fn is_left(&self) -> bool {
        self.leaving.has_begun()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.is_left() {
            std::mem::forget(self.reply.take());
        }
    }
}
