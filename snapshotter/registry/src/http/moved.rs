//! Where blobs were found lately: registries redirect to object stores, and the next range of a blob
//! needn't ask for the way again.
//!
//! Owns: the targets, for [`FRESH`], well below the life of presigned URLs. They hold signatures, and
//! so never leave this module but to be asked.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reqwest::Url;

const FRESH: Duration = Duration::from_secs(60);
const TARGETS: usize = 1024;

#[derive(Default)]
pub struct Moved(Mutex<HashMap<Url, (Instant, Url)>>);

impl Moved {
    pub fn target(&self, from: &Url) -> Option<Url> {
        let moved = self.lock();
        let (since, target) = moved.get(from)?;
        (since.elapsed() < FRESH).then(|| target.clone())
    }

    pub fn remember(&self, from: Url, target: Url) {
        let mut moved = self.lock();
        if moved.len() >= TARGETS {
            moved.retain(|_, (since, _)| since.elapsed() < FRESH);
        }
        if moved.len() < TARGETS {
            moved.insert(from, (Instant::now(), target));
        }
    }

    pub fn forget(&self, from: &Url) {
        self.lock().remove(from);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Url, (Instant, Url)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
