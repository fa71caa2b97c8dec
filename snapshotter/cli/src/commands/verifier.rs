//! `verifier`: the program that containerd 2.x asks before a pull (containerd's docs/image-verification.md).
//!
//! It is asked whether an image may be pulled, says yes, and uses the moment to have the blobs put where the pull looks
//! for them. Whatever goes wrong, the pull goes on.

use std::time::Duration;

use skimmer_proto::node::StageRequest;

use crate::cli::Global;
use crate::daemon::{connect, plain};

/// Prints one line, which containerd takes for the reason of the judgement.
pub async fn verifier(global: &Global, timeout: Duration, arguments: &[String]) {
    let said = match tokio::time::timeout(timeout, stage(global, arguments)).await {
        Ok(Ok(())) => "skimmer has the image ready".to_owned(),
        Ok(Err(error)) => format!("skimmer hasn't got the image: {error:#}"),
        Err(_) => format!("skimmer didn't have the image ready within {timeout:?}; it goes on"),
    };
    println!("{said}");
}

async fn stage(global: &Global, arguments: &[String]) -> anyhow::Result<()> {
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument.trim_start_matches('-') == name);
        at.and_then(|at| arguments.get(at + 1)).cloned()
    };
    let (Some(reference), Some(digest)) = (value("name"), value("digest")) else {
        anyhow::bail!("it was called without -name and -digest");
    };
    let request = StageRequest { reference, digest, platform: String::new() };
    let stream = connect(&global.address).await?.stage(request).await.map_err(plain)?;
    let mut stream = stream.into_inner();
    while stream.message().await.map_err(plain)?.is_some() {}
    Ok(())
}
