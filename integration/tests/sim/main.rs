//! The real scheduler and a modelled network in virtual time. `SEED=n` replays one history.
#![expect(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod histories;
mod large;
