//! `pull` and `fetch`.

use skimmer_proto::node::{FetchRequest, PullRequest};

use crate::cli::{Global, Output};
use crate::commands::images::layers;
use crate::daemon::{connect, plain};
use crate::progress::{Measure, follow};

pub async fn pull(
    global: &Global,
    reference: String,
    namespace: String,
    platform: Option<String>,
    snapshotter: String,
) -> anyhow::Result<()> {
    let request =
        PullRequest { reference, namespace, platform: platform.unwrap_or_default(), snapshotter };
    let stream = connect(&global.address).await?.pull(request).await.map_err(plain)?;
    let image = follow(stream.into_inner(), global.output, Measure::Mountable).await?;
    if global.output == Output::Text {
        println!("{}  {}", image.name, image.digest);
        layers(&image);
    }
    Ok(())
}

pub async fn fetch(
    global: &Global,
    image: String,
    namespace: Option<String>,
) -> anyhow::Result<()> {
    let request = FetchRequest { image, namespace: namespace.unwrap_or_default() };
    let stream = connect(&global.address).await?.fetch(request).await.map_err(plain)?;
    let image = follow(stream.into_inner(), global.output, Measure::Complete).await?;
    if global.output == Output::Text {
        println!("{}: every byte is on this node", image.name);
        layers(&image);
    }
    Ok(())
}
