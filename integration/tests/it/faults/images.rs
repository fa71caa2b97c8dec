//! Images whose every byte is known.

use std::fmt::Write as _;
use std::path::PathBuf;

use skimmer_integration::fleet::Fleet;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::scenario::Scenario;
use skimmer_integration::tar::Tar;
use skimmer_proto::Digest;

use crate::fixtures::{blobs, busybox, seed};
use crate::swarm_burst::LIMIT;
use crate::swarm_indexes::wait_records;

/// An image in the registry, and what its files hold.
#[derive(Clone, Debug)]
pub struct Known {
    pub reference: String,
    /// Of the layer with its files.
    pub blob: Digest,
    /// The name below `/data` and the digest of each of its files.
    files: Vec<(String, Digest)>,
    /// Where the indexes of its layers are, each in a file.
    pub indexes: PathBuf,
}

impl Known {
    /// busybox, and below `/data` files of these `sizes`; the seed peer of `fleet` has it, and its indexes.
    pub fn new(
        scenario: &Scenario,
        fleet: &Fleet<'_>,
        seed_peer: usize,
        name: &str,
        sizes: &[usize],
    ) -> anyhow::Result<Self> {
        let mut tar = Tar::new().dir("data/");
        let mut files = Vec::new();
        for (number, size) in sizes.iter().enumerate() {
            let file = number.to_string();
            let bytes = noise(seed(&format!("{name}-{number}")), *size);
            tar = tar.file(format!("data/{file}"), &bytes);
            files.push((file, Digest::of(&bytes)));
        }
        let data = Layer::of(&tar.end(), Format::Gzip, &blobs(scenario))?;
        let blob = data.blob.digest;
        let layers = vec![busybox(scenario, Format::Gzip)?, data];
        let image = Plan::new(&format!("faults/{name}"), layers).build(&blobs(scenario))?;
        let reference = fleet.registry.add(&image)?;
        fleet.machines[seed_peer].build(&reference)?.wait(LIMIT)?;
        wait_records(fleet, &image, 1)?;
        let indexes = scenario.path("indexes").join(name);
        fleet.machines[seed_peer].skimmerd.export_indexes(&image, &indexes)?;
        Ok(Self { reference, blob, files, indexes })
    }

    /// A line for each file: its SHA-256 in hexadecimal, and its path in a container.
    pub fn sums(&self) -> String {
        let mut text = String::new();
        for (file, digest) in &self.files {
            // Writing to a string doesn't fail.
            let _ = writeln!(text, "{} /data/{file}", digest.hex());
        }
        text
    }
}
