//! Upload shaping at work: waits until the [`Shaper`] grants a slice.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use skimmer_cache::Class;
use skimmer_identity::PeerId;
use tokio::sync::{Notify, oneshot};

use super::shape::{Shaper, Ticket};

/// Bytes that may go at once after a pause: short against what a person notices, long against timers.
const BURST: u64 = 512 << 10;

/// The node's upload. Without a limit it grants at once.
pub struct Upload {
    shaped: Option<Shaped>,
}

struct Shaped {
    state: Mutex<State>,
    asked: Notify,
    epoch: Instant,
}

struct State {
    shaper: Shaper,
    waiting: BTreeMap<Ticket, oneshot::Sender<()>>,
}

impl Upload {
    pub fn new(bytes_per_second: Option<u64>) -> Arc<Self> {
        let shaped = bytes_per_second.map(|rate| Shaped {
            state: Mutex::new(State {
                shaper: Shaper::new(rate.max(1), BURST),
                waiting: BTreeMap::new(),
            }),
            asked: Notify::new(),
            epoch: Instant::now(),
        });
        Arc::new(Self { shaped })
    }

    /// Waits for the turn of `bytes` for `peer`.
    pub async fn turn(&self, peer: PeerId, class: Class, bytes: usize) {
        let Some(shaped) = &self.shaped else { return };
        let (sender, granted) = oneshot::channel();
        {
            let mut state = shaped.lock();
            let ticket = state.shaper.ask(peer, class, u64::try_from(bytes).unwrap_or(u64::MAX));
            state.waiting.insert(ticket, sender);
        }
        shaped.asked.notify_one();
        // It fails only when the transport is being dropped.
        let _ = granted.await;
    }

    /// Grants turns for as long as it is polled.
    pub async fn run(&self) {
        let Some(shaped) = &self.shaped else { return std::future::pending().await };
        loop {
            let next = {
                let mut state = shaped.lock();
                for ticket in state.shaper.grant(shaped.epoch.elapsed()) {
                    if let Some(sender) = state.waiting.remove(&ticket) {
                        // Who asked may have gone; the bytes are then simply not sent.
                        let _ = sender.send(());
                    }
                }
                state.shaper.next_grant()
            };
            match next {
                None => shaped.asked.notified().await,
                Some(next) => {
                    let at = (shaped.epoch + next).into();
                    tokio::select! {
                        () = tokio::time::sleep_until(at) => {}
                        // Somebody more urgent perhaps.
                        () = shaped.asked.notified() => {}
                    }
                }
            }
        }
    }
}

impl Shaped {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
