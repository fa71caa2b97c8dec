//! `images` and `status`.

use std::collections::BTreeSet;

use skimmer_proto::node::ImagesRequest;

use crate::cli::{Global, Output};
use crate::daemon::{connect, plain};
use crate::output::{ImageView, bytes, json, percent, short, table};

pub async fn images(global: &Global, namespace: Option<String>) -> anyhow::Result<()> {
    let images = ask(global, None, namespace).await?;
    if global.output == Output::Json {
        return json(&images);
    }
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|image| {
            vec![
                image.namespace.clone(),
                image.name.clone(),
                short(&image.digest),
                image.layers.len().to_string(),
                bytes(image.size),
                image.mode().to_owned(),
                bytes(image.bytes_present),
            ]
        })
        .collect();
    table(&["NAMESPACE", "IMAGE", "DIGEST", "LAYERS", "SIZE", "MODE", "ON DISK"], &rows);
    Ok(())
}

pub async fn status(
    global: &Global,
    image: Option<String>,
    namespace: Option<String>,
) -> anyhow::Result<()> {
    let wanted = image.is_some();
    let images = ask(global, image.clone(), namespace).await?;
    if wanted && images.is_empty() {
        anyhow::bail!(
            "no image {:?} in containerd (see `skimmer images`)",
            image.unwrap_or_default()
        );
    }
    if global.output == Output::Json {
        return json(&images);
    }
    for image in &images {
        println!("{}  {}  {}", image.name, short(&image.digest), image.namespace);
        layers(image);
        println!();
    }
    Ok(())
}

/// The table of an image's layers, and under it what went wrong.
pub fn layers(image: &ImageView) {
    let rows: Vec<Vec<String>> = image
        .layers
        .iter()
        .map(|layer| {
            vec![
                short(&layer.digest),
                layer.standing(),
                bytes(layer.size),
                percent(layer.data_bytes_present, layer.data_bytes),
                bytes(layer.fetched.fault),
                bytes(layer.fetched.pull_through),
                bytes(layer.fetched.background),
                bytes(layer.fetched.origin),
                bytes(layer.fetched.swarm),
                if layer.index_bytes == 0 { "-".to_owned() } else { bytes(layer.index_bytes) },
            ]
        })
        .collect();
    let header = [
        "LAYER",
        "MODE",
        "SIZE",
        "DECODED",
        "FAULT",
        "PULL-THROUGH",
        "BACKGROUND",
        "ORIGIN",
        "SWARM",
        "INDEX",
    ];
    table(&header, &rows);
    for layer in image.layers.iter().filter(|layer| !layer.error.is_empty()) {
        println!("{}: {}", short(&layer.digest), layer.error);
    }
    let lost: BTreeSet<&String> = image.layers.iter().flat_map(|layer| &layer.lost).collect();
    for container in lost {
        println!("{container}: nobody kept the mounts of its layers, start it anew");
    }
}

async fn ask(
    global: &Global,
    image: Option<String>,
    namespace: Option<String>,
) -> anyhow::Result<Vec<ImageView>> {
    let request = ImagesRequest {
        namespace: namespace.unwrap_or_default(),
        image: image.unwrap_or_default(),
    };
    let response = connect(&global.address).await?.images(request).await.map_err(plain)?;
    Ok(response.into_inner().images.into_iter().map(ImageView::from).collect())
}
