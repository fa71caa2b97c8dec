//! Moving layer indexes between nodes, so that a node with an empty cache mounts lazily.

use std::path::PathBuf;

use anyhow::Context as _;
use skimmer_integration::image::Image;
use skimmer_integration::node::Node;
use skimmer_integration::scenario::Scenario;
use skimmer_integration::skimmerd::Skimmerd;

/// Exports the indexes of all of an image's layers.
pub fn export(scenario: &Scenario, node: &Node, image: &Image) -> anyhow::Result<Vec<PathBuf>> {
    let folder = scenario.path("indexes");
    std::fs::create_dir_all(&folder)?;
    let mut files = Vec::new();
    for layer in &image.layers {
        let file = folder.join(layer.blob.digest.hex());
        if !file.exists() {
            let name = file.to_str().context("path is not UTF-8")?;
            node.skimmerd.ask(&["index", "export", &layer.blob.digest.to_string(), name])?;
        }
        files.push(file);
    }
    Ok(files)
}

/// Imports exported indexes.
pub fn import(node: &Node, files: &[PathBuf]) -> anyhow::Result<()> {
    import_into(&node.skimmerd, files)
}

pub fn import_into(skimmerd: &Skimmerd, files: &[PathBuf]) -> anyhow::Result<()> {
    for file in files {
        skimmerd.ask(&["index", "import", file.to_str().context("path is not UTF-8")?])?;
    }
    Ok(())
}

/// Has the node learn an image's indexes, then forget everything but them: the image isn't in containerd yet.
pub fn learn(
    scenario: &Scenario,
    node: &mut Node,
    images: &[(&Image, &str)],
) -> anyhow::Result<()> {
    let mut files = Vec::new();
    for (image, reference) in images {
        node.skimmerd.ask(&["index", "build", reference])?;
        files.extend(export(scenario, node, image)?);
    }
    node.skimmerd.terminate()?;
    node.skimmerd.wipe()?;
    node.skimmerd.run()?;
    node.wait_connected()?;
    import(node, &files)
}
