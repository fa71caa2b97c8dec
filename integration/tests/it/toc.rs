//! Layers with a table of contents inside: the image author's word, so they are proved like all others.

use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::estargz;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;

use crate::fixtures::{blobs, busybox, mount_point};

#[test]
fn estargz_is_proved_before_it_is_mounted() {
    scenario("toc-distrusted", |scenario| {
        let registry = Registry::start(scenario)?;
        let (first, second) = (noise(31, 6 << 20), noise(32, 3_000_001));
        let files: [(&str, &[u8]); 5] = [
            ("data/", b""),
            ("data/empty", b""),
            ("data/a", &first),
            ("data/b", &second),
            ("data/c", b"short"),
        ];
        let layers =
            vec![busybox(scenario, Format::Gzip)?, estargz::layer(&files, &blobs(scenario))?];
        let image = Plan::new("toc/stargz", layers).build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let node = Node::start(scenario, Version::V2)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let text =
            node.containerd.run_image(&reference, "skimmer", "short", &["cat", "/data/c"])?;
        anyhow::ensure!(text == "short", "/data/c holds {text:?}");
        let blob = &image.layers[1].blob;
        let sent = registry.sent(&blob.digest);
        anyhow::ensure!(sent.by_daemon == sent.bytes, "containerd fetched it: {sent:?}");
        anyhow::ensure!(
            sent.bytes >= blob.size,
            "{sent:?} of {} bytes: it wasn't proved",
            blob.size
        );
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        for (file, bytes) in [("data/a", &first), ("data/b", &second), ("data/empty", &Vec::new())]
        {
            anyhow::ensure!(
                &std::fs::read(view.path().join(file))? == bytes,
                "{file} holds other bytes"
            );
        }
        Ok(())
    });
}
