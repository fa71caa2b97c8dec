//! `pull`, `materialize` and `fetch`.

use skimmer_proto::node::{FetchRequest, MaterializeRequest, PullRequest};

use crate::cli::{Global, Output};
use crate::commands::images::layers;
use crate::daemon::{connect, plain};
use crate::progress::{Measure, follow};

pub async fn pull(global: &Global, request: PullRequest) -> anyhow::Result<()> {
    let measure = if request.full { Measure::Blobs } else { Measure::Mountable };
    let stream = connect(&global.address).await?.pull(request).await.map_err(plain)?;
    let image = follow(stream.into_inner(), global.output, measure).await?;
    if global.output == Output::Text {
        println!("{}  {}", image.name, image.digest);
        layers(&image);
    }
    Ok(())
}

pub async fn materialize(
    global: &Global,
    image: String,
    namespace: Option<String>,
) -> anyhow::Result<()> {
    let request = MaterializeRequest { image, namespace: namespace.unwrap_or_default() };
    let stream = connect(&global.address).await?.materialize(request).await.map_err(plain)?;
    let image = follow(stream.into_inner(), global.output, Measure::Blobs).await?;
    if global.output == Output::Text {
        println!("{}: every blob is in containerd's content store", image.name);
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
