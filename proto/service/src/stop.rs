//! When a program is told to end.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// Resolves on SIGTERM or SIGINT; both are caught from the call on.
///
/// # Errors
/// If the signals can't be caught, or there is no runtime.
pub fn asked() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
