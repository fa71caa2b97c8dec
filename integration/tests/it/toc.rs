//! Layers with a table of contents inside: believed before they were read only if the operator says so.

use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::estargz;
use skimmer_integration::image::Plan;
use skimmer_integration::layer::{Format, noise};
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::scenario;
use skimmer_integration::skimmerd;

use crate::fixtures::{blobs, busybox, mount_point};

#[test]
fn estargz_is_lazy_only_when_its_table_is_trusted() {
    for (name, trust_toc) in [("toc-trusted", true), ("toc-distrusted", false)] {
        scenario(name, |scenario| {
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
            let skimmerd = skimmerd::Setup { trust_toc, ..Default::default() };
            let node =
                Node::start_with(scenario, Version::V2, &Setup { skimmerd, ..Setup::default() })?;
            node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
            let text =
                node.containerd.run_image(&reference, "skimmer", "short", &["cat", "/data/c"])?;
            anyhow::ensure!(text == "short", "/data/c holds {text:?}");
            let blob = &image.layers[1].blob;
            let sent = registry.sent(&blob.digest);
            anyhow::ensure!(sent.by_daemon == sent.bytes, "containerd fetched it: {sent:?}");
            if trust_toc {
                anyhow::ensure!(
                    sent.bytes < blob.size / 3,
                    "{sent:?} of {} bytes for 5",
                    blob.size
                );
            } else {
                anyhow::ensure!(
                    sent.bytes >= blob.size,
                    "{sent:?} of {} bytes: it wasn't proved",
                    blob.size
                );
            }
            let view = node.view(&image, &mount_point(scenario, "view"))?;
            for (file, bytes) in
                [("data/a", &first), ("data/b", &second), ("data/empty", &Vec::new())]
            {
                anyhow::ensure!(
                    &std::fs::read(view.path().join(file))? == bytes,
                    "{file} holds other bytes"
                );
            }
            Ok(())
        });
    }
}
