//! Programs that run scenarios: what happens when someone stops them halfway.

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::sweep;

/// From now on, Ctrl-C and SIGTERM sweep up what this process's scenarios made, and end it.
pub fn sweep_and_exit() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("listen for signals")?;
    // Registered here, so that no signal can come too early.
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => () }
        });
        eprintln!("stopping: removing containers, mounts and files");
        sweep::own(&std::env::temp_dir());
        std::process::exit(130);
    });
    Ok(())
}
