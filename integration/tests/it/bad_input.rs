//! Images that are broken or lie, and indexes that were tampered with: an error that says what and why, and nobody else
//! notices.

use skimmer_integration::command::{PATIENCE, failure_of};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, gzip, noise};
use skimmer_integration::node::Node;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::tar::{Header, Tar};
use skimmer_proto::Digest;

use crate::fixtures::{blobs, busybox, data, mount_point, seed, small};
use crate::indexes;

/// A layer whose blob is `blob` and whose DiffID is `diff_id`, true or not.
fn layer(scenario: &Scenario, blob: &[u8], diff_id: Digest) -> anyhow::Result<Layer> {
    Layer::new(blob, diff_id, Format::Gzip, &blobs(scenario))
}

/// What is wrong with an image, and a word that a person needs to find in the error, beside the layer's digest.
struct Bad {
    name: &'static str,
    image: Image,
    /// One of these has to be there.
    cause: &'static [&'static str],
}

/// A good tar stream of its own for each case: a DiffID that several images claim may be proved by any of them.
fn content(name: &str) -> Vec<u8> {
    Tar::new().dir("d/").file(format!("d/{name}"), &noise(seed(name), 600_000)).end()
}

/// Layers that are broken or aren't what the image says.
fn broken(name: &str, scenario: &Scenario) -> anyhow::Result<Layer> {
    let tar = content(name);
    let (mut blob, mut diff_id) = (gzip(&tar)?, Digest::of(&tar));
    let length = blob.len();
    match name {
        "truncated-gzip" => blob.truncate(length / 2),
        "torn-gzip" => blob[length / 2..length / 2 + 64].fill(0xa5),
        "lying-trailer" => blob[length - 8..].fill(7),
        "not-gzip" => blob = noise(22, 5000),
        "wrong-diff-id" => diff_id = Digest::of(b"something else"),
        // Eight EiB in one file, declared but not there.
        "declared-8-eib" => {
            let huge = Header { size: 1 << 63, gnu: true, ..Header::new("huge", b'0') };
            let bomb = Tar::new().entry(huge, b"").end();
            (blob, diff_id) = (gzip(&bomb)?, Digest::of(&bomb));
        }
        "too-deep" => {
            let deep = Tar::new().pax(&[("path", "d/".repeat(2000).as_bytes())]).dir("x/").end();
            (blob, diff_id) = (gzip(&deep)?, Digest::of(&deep));
        }
        _ => {}
    }
    layer(scenario, &blob, diff_id)
}

fn bad_images(scenario: &Scenario, registry: &Registry) -> anyhow::Result<Vec<Bad>> {
    let base = busybox(scenario, Format::Gzip)?;
    let mut all = Vec::new();
    let cases: [(&'static str, &'static [&'static str]); 10] = [
        ("truncated-gzip", &["ends at byte"]),
        ("torn-gzip", &["gzip", "deflate", "checksum", "DiffID"]),
        ("lying-trailer", &["checksum", "length"]),
        ("not-gzip", &["tar", "header", "gzip", "DiffID"]),
        ("wrong-diff-id", &["DiffID", "diff"]),
        ("wrong-digest", &["digest", "SHA-256", "sha256"]),
        ("short-blob", &["length", "bytes", "size", "range"]),
        // Containerd is left to try it: ctr asks the registry itself, `skimmer pull` does not.
        ("lost-blob", &["404", "not found", "does not exist"]),
        ("declared-8-eib", &["huge", "size", "large"]),
        ("too-deep", &["deep", "depth", "path"]),
    ];
    for (name, cause) in cases {
        let bad = broken(name, scenario)?;
        let digest = bad.blob.digest;
        let image =
            Plan::new(&format!("bad/{name}"), vec![base.clone(), bad]).build(&blobs(scenario))?;
        registry.add(&image)?;
        match name {
            "wrong-digest" => registry.falsify(&digest, |bytes| bytes[100] ^= 1)?,
            "short-blob" => registry.falsify(&digest, |bytes| bytes.truncate(1000))?,
            "lost-blob" => registry.lose(&digest)?,
            _ => {}
        }
        all.push(Bad { name, image, cause });
    }
    Ok(all)
}

#[test]
fn bad_images_are_refused_and_named() {
    scenario("bad-images", |scenario| {
        let registry = Registry::start(scenario)?;
        let node = Node::start(scenario, Version::V2)?;
        let honest = small(scenario, "bad/honest")?;
        let reference = registry.add(&honest)?;
        let mut wrong = Vec::new();
        for Bad { name, image, cause } in bad_images(scenario, &registry)? {
            let digest = image.layers[1].blob.digest;
            node.skimmerd.expect_log(&digest.to_string());
            node.skimmerd.expect_log(&image.name);
            for (way, said) in [
                (
                    "skimmer pull",
                    node.skimmerd
                        .skimmer(&["pull", &registry.reference(&image)])
                        .and_then(|mut call| failure_of(&mut call, PATIENCE)),
                ),
                (
                    "ctr pull",
                    node.containerd.pull_fails(&Pull::new(&registry.reference(&image), "skimmer")),
                ),
            ] {
                match said {
                    Err(error) => wrong.push(format!("{name} by {way}: {error}")),
                    Ok(said) => {
                        if !cause.iter().any(|word| said.contains(word))
                            || !said.contains(&digest.hex()[..12])
                            || !said.contains(&image.name)
                        {
                            wrong.push(format!(
                                "{name} by {way} doesn't say what is wrong: {}",
                                said.trim()
                            ));
                        }
                    }
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.run_image(
            &reference,
            "skimmer",
            "honest",
            &["md5sum", "/data/bad-honest"],
        )?;
        Ok(())
    });
}

#[test]
fn foreign_layers_are_refused_and_named() {
    scenario("foreign-layers", |scenario| {
        let registry = Registry::start(scenario)?;
        let node = Node::start(scenario, Version::V2)?;
        let base = busybox(scenario, Format::Gzip)?;
        for oci in [true, false] {
            let foreign = data(scenario, &format!("foreign-{oci}"), 100_000, Format::Foreign)?;
            let digest = foreign.blob.digest;
            let mut plan = Plan::new(&format!("foreign/{oci}"), vec![base.clone(), foreign]);
            plan.oci = oci;
            let image = plan.build(&blobs(scenario))?;
            let reference = registry.add(&image)?;
            registry.lose(&digest)?;
            let mut pull = node.skimmerd.skimmer(&["pull", &reference])?;
            let said = failure_of(&mut pull, PATIENCE)?;
            for part in [&reference, &digest.to_string(), "foreign (non-distributable)"] {
                anyhow::ensure!(said.contains(part), "{part} is not in {said}");
            }
            // Containerd asks the layer's own address.
            let said = node.containerd.pull_fails(&Pull::new(&reference, "skimmer"))?;
            for part in [&image.name, "http://127.0.0.1:1/layer.tar.gz", "connection refused"] {
                anyhow::ensure!(said.contains(part), "{part} is not in {said}");
            }
        }
        Ok(())
    });
}

#[test]
fn an_image_that_claims_anothers_diff_ids_is_refused() {
    for (name, version) in [("poison-1.7", Version::V1_7), ("poison-2", Version::V2)] {
        scenario(name, |scenario| {
            let registry = Registry::start(scenario)?;
            let base = busybox(scenario, Format::Gzip)?;
            let honest = data(scenario, "honest", 1 << 20, Format::Gzip)?;
            let evil = data(scenario, "evil", 1 << 20, Format::Gzip)?;
            let target = Plan::new("poison/honest", vec![base.clone(), honest.clone()])
                .build(&blobs(scenario))?;
            let mut plan = Plan::new("poison/evil", vec![base.clone(), evil.clone()]);
            plan.claimed = Some(vec![base.diff_id, honest.diff_id]);
            plan.author = "evil".into();
            let poison = plan.build(&blobs(scenario))?;
            let (reference, poisoned) = (registry.add(&target)?, registry.add(&poison)?);
            let node = Node::start(scenario, version)?;
            node.skimmerd.expect_log(&evil.blob.digest.to_string());
            node.skimmerd.expect_log("poison/evil");
            // The evil blob has been read before, as itself: its index and table are at hand and say what it is.
            let own = Plan::new("poison/itself", vec![base.clone(), evil.clone()])
                .build(&blobs(scenario))?;
            let own = registry.add(&own)?;
            node.skimmerd.ask(&["index", "build", &own])?;
            // It also holds the base layer's snapshot, which containerd would collect after a failed pull, at any time.
            node.skimmerd.ask(&["pull", &own])?;
            let mut call = node.skimmerd.skimmer(&["pull", &poisoned])?;
            let said = failure_of(&mut call, PATIENCE)?;
            anyhow::ensure!(
                said.contains(&honest.diff_id.hex()[..12]),
                "the refusal doesn't name the DiffID: {said}"
            );
            node.containerd.pull_fails(&Pull::new(&poisoned, "skimmer"))?;
            // The honest image under the same chain IDs is what it always was.
            node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
            let view = node.view(&target, &mount_point(scenario, "view"))?;
            let bytes = std::fs::read(view.path().join("data/honest"))?;
            anyhow::ensure!(
                bytes == noise(seed("honest"), 1 << 20),
                "other bytes in the honest file"
            );
            anyhow::ensure!(
                !view.path().join("data/evil").exists(),
                "the evil file is in the honest image"
            );
            Ok(())
        });
    }
}

#[test]
fn tampered_indexes_never_show_wrong_bytes() {
    scenario("tampered-index", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "bad/index")?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        node.skimmerd.ask(&["index", "build", &reference])?;
        let files = indexes::export(scenario, &node, &image)?;
        let exported = std::fs::read(&files[1])?;
        node.skimmerd.terminate()?;
        node.skimmerd.wipe()?;
        node.skimmerd.run()?;
        node.skimmerd.expect_log(&image.layers[1].blob.digest.to_string());
        let tampered = scenario.path("tampered");
        let name = tampered.to_str().unwrap_or_default();
        for length in [0, 1, 10, exported.len() / 3, exported.len() - 1] {
            std::fs::write(&tampered, &exported[..length])?;
            let import = node.skimmerd.ask(&["index", "import", name]);
            anyhow::ensure!(
                import.is_err(),
                "an index of {length} of {} bytes was accepted",
                exported.len()
            );
        }
        for number in 0..64 {
            let mut bytes = exported.clone();
            let at = number * bytes.len() / 64;
            bytes[at] ^= 1 << (number % 8);
            std::fs::write(&tampered, &bytes)?;
            if node.skimmerd.ask(&["index", "import", name]).is_err() {
                continue;
            }
            // An import is the operator's word. Where it is wrong, pulls are refused or readers get an error.
            if node.containerd.pull(&Pull::new(&reference, "skimmer")).is_ok() {
                let view = node.view(&image, &mount_point(scenario, "view"))?;
                if let Ok(read) = std::fs::read(view.path().join("data/bad-index")) {
                    let right = read == noise(seed("bad-index"), 8 << 20);
                    anyhow::ensure!(right, "with byte {at} tampered with, other bytes were read");
                }
                drop(view);
                node.containerd.remove_image(&reference)?;
            }
            node.skimmerd.terminate()?;
            node.skimmerd.wipe()?;
            node.skimmerd.run()?;
            node.wait_connected()?;
        }
        indexes::import(&node, &files)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        node.containerd.run_image(
            &reference,
            "skimmer",
            "after",
            &["md5sum", "/data/bad-index"],
        )?;
        Ok(())
    });
}

#[test]
fn falsified_bytes_never_reach_a_reader() {
    scenario("falsified", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "bad/falsified")?;
        let reference = registry.add(&image)?;
        let mut node = Node::start(scenario, Version::V2)?;
        indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let digest = image.layers[1].blob.digest;
        let original = std::fs::read(&image.layers[1].blob.path)?;
        registry.falsify(&digest, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        })?;
        node.skimmerd.expect_log(&digest.to_string());
        let view = node.view(&image, &mount_point(scenario, "view"))?;
        let file = view.path().join("data/bad-falsified");
        let read = std::fs::read(&file);
        anyhow::ensure!(read.is_err(), "falsified bytes were read");
        // The rest of the file is good, and so is all of it once the registry tells the truth again.
        registry.falsify(&digest, |bytes| *bytes = original)?;
        let bytes = std::fs::read(&file)?;
        anyhow::ensure!(bytes == noise(seed("bad-falsified"), 8 << 20), "other bytes afterwards");
        Ok(())
    });
}
