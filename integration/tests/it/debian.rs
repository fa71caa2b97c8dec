//! A real image: Debian with Python and numpy imports numpy long before it has arrived.

use anyhow::Context as _;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::debian;
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::tree;

use crate::fixtures::{blobs, mount_point};
use crate::indexes;

#[test]
fn numpy_is_imported_lazily() {
    scenario("debian", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = debian::numpy(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        let before = registry.sent_of(&image).bytes;
        anyhow::ensure!(
            before == image.compressed_bytes(),
            "indexing fetched {before} bytes of {}",
            image.compressed_bytes()
        );

        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let output = node.containerd.run_image(&reference, "skimmer", "numpy", &debian::COMMAND)?;
        anyhow::ensure!(output == "1\n", "the container said {output:?}");
        let fetched = registry.sent_of(&image).bytes - before;
        let share = fetched * 100 / image.compressed_bytes();
        anyhow::ensure!(share <= 30, "{fetched} bytes were fetched, {share} % of the image");

        // The whole tree, byte by byte, against the same image unpacked.
        let expected = tree::read(&image.unpack(&scenario.path("umoci"))?)?;
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        let mut actual = tree::read(view.path())?;
        // The root has no entry in the layers; several directories of the upper layers have none either.
        for (path, entry) in &mut actual {
            if entry.kind == tree::Kind::Directory {
                let wanted =
                    expected.get(path).with_context(|| format!("{path:?} is not expected"))?;
                entry.time = wanted.time;
            }
        }
        let differences = tree::differences(&expected, &actual);
        anyhow::ensure!(
            differences.is_empty(),
            "{} differences:\n{}",
            differences.len(),
            differences[..10.min(differences.len())].join("\n")
        );
        Ok(())
    });
}
