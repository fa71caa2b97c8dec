//! Images whole in containerd's content store: one copy on disk, and what people do with it.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use skimmer_integration::command::{self, PATIENCE};
use skimmer_integration::containerd::{self, Containerd, VERSIONS, Version};
use skimmer_integration::cri::Cri;
use skimmer_integration::ctr::{Ctr, Pull};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::Format;
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::{Auth, Registry};
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, Skimmerd};
use skimmer_integration::tools;
use skimmer_proto::Digest;

use crate::fixtures::{blobs, busybox, data, pause, small};
use crate::indexes;

/// Where containerd keeps a blob.
fn stored(containerd: &Ctr, digest: &Digest) -> PathBuf {
    let store = "io.containerd.content.v1.content/blobs/sha256";
    containerd.root().join(store).join(digest.hex())
}

/// Where a skimmer keeps it that keeps everything in `root`.
fn cached(root: &Path, digest: &Digest) -> PathBuf {
    root.join("cache/blobs-v1").join(digest.hex()).join("data")
}

/// Every layer's blob is one file with two names, and has its bytes.
pub fn check_linked(node: &Node, image: &Image) -> anyhow::Result<()> {
    check_linked_in(&node.containerd, &node.skimmerd.root(), image)
}

/// The same of a containerd and of a skimmer that keeps everything in `root`.
pub fn check_linked_in(containerd: &Ctr, root: &Path, image: &Image) -> anyhow::Result<()> {
    for layer in &image.layers {
        let digest = layer.blob.digest;
        let (theirs, ours) = (stored(containerd, &digest), cached(root, &digest));
        let (own, other) = (std::fs::metadata(&ours)?, std::fs::metadata(&theirs)?);
        anyhow::ensure!(own.ino() == other.ino(), "{digest} is there twice");
        anyhow::ensure!(own.nlink() == 2 && own.mode() & 0o777 == 0o444, "{own:?}");
        anyhow::ensure!(Digest::of(&std::fs::read(&theirs)?) == digest, "{digest} has other bytes");
    }
    Ok(())
}

/// What du counts in both folders together: a file with two names once.
fn disk_bytes(folders: &[&Path]) -> anyhow::Result<u64> {
    let said = command::run(
        "du",
        ["-s", "-c", "-B1"].iter().map(|text| Path::new(*text)).chain(folders.iter().copied()),
    )?;
    let total = said.lines().last().and_then(|line| line.split('\t').next()).unwrap_or_default();
    Ok(total.parse()?)
}

fn ctr(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    command::output_of(node.containerd.ctr()?.args(arguments), PATIENCE)
}

#[test]
fn a_lazy_image_is_materialized_and_then_pushed_exported_and_converted() {
    for version in VERSIONS {
        scenario(&format!("materialize-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "content/lazy")?;
            let reference = registry.add(&image)?;
            let mut node = Node::start(scenario, version)?;
            indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
            node.skimmerd.ask(&["pull", &reference, "--namespace", "default"])?;
            let data = image.layers[1].blob.digest;
            anyhow::ensure!(!stored(&node.containerd, &data).exists(), "it isn't lazy");
            let before = registry.sent_of(&image);

            let said = node.skimmerd.ask(&["materialize", &reference])?;
            anyhow::ensure!(said["image"]["name"] == reference.as_str(), "{said}");
            check_linked(&node, &image)?;
            let sent = registry.sent_of(&image).bytes - before.bytes;
            anyhow::ensure!(sent <= image.compressed_bytes(), "{sent} bytes were fetched for it");
            let folders = [node.skimmerd.root().join("cache/blobs-v1"), node.containerd.root()];
            let disk = disk_bytes(&[&folders[0], &folders[1]])?;
            anyhow::ensure!(
                disk < image.compressed_bytes() * 3 / 2,
                "{disk} bytes for one copy of {}",
                image.compressed_bytes()
            );
            // Nobody's lease is needed: the manifest leads to the blobs.
            node.containerd.collect_garbage(&reference)?;
            check_linked(&node, &image)?;

            let archive = scenario.path("image.tar");
            ctr(&node, &["image", "export", &archive.display().to_string(), &reference])?;
            let listed = command::run("tar", ["-tf", &archive.display().to_string()])?;
            anyhow::ensure!(listed.contains(data.hex().as_str()), "the archive has {listed}");

            let other = Registry::start_with(scenario, "second", &Auth::Anyone, None)?;
            let name = format!("{}/content/pushed:latest", other.address());
            ctr(&node, &["image", "tag", &reference, &name])?;
            ctr(&node, &["image", "push", "--plain-http", &name])?;
            let pushed = node.skimmerd.ask(&["index", "build", &name])?;
            let digest = image.manifest.digest.to_string();
            anyhow::ensure!(pushed["image"]["digest"] == digest.as_str(), "{pushed}");

            let converted = format!("{}/content/plain:latest", other.address());
            ctr(&node, &["image", "convert", "--uncompress", "--oci", &reference, &converted])?;
            node.containerd.run_image(&reference, "skimmer", "lazy", &["true"])?;
            node.containerd.run_image(&converted, "overlayfs", "plain", &["true"])?;
            // A second time there is nothing to do.
            node.skimmerd.ask(&["materialize", &reference, "--namespace", "default"])?;
            check_linked(&node, &image)
        });
    }
}

#[test]
fn a_full_pull_is_for_any_snapshotter_and_asks_the_registry_once() {
    for version in VERSIONS {
        scenario(&format!("pull-full-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let layers = vec![
                busybox(scenario, Format::Gzip)?,
                data(scenario, "content-full", 8 << 20, Format::Zstd)?,
            ];
            let mut plan = Plan::new("content/full", layers);
            plan.index = true;
            let image = plan.build(&blobs(scenario))?;
            let reference = registry.add(&image)?;
            let node = Node::start(scenario, version)?;
            node.skimmerd.ask(&["pull", "--full", &reference, "--namespace", "default"])?;
            check_linked(&node, &image)?;
            let by_digest =
                format!("{}@{}", reference.trim_end_matches(":latest"), image.top().0.digest);
            let names = node.containerd.images()?;
            for name in [&reference, &by_digest] {
                anyhow::ensure!(names.contains(name), "{name} is not among {names:?}");
            }
            let sent = registry.sent_of(&image);
            anyhow::ensure!(
                (sent.bytes, sent.by_daemon)
                    == (image.compressed_bytes(), image.compressed_bytes()),
                "{sent:?}"
            );
            let output =
                node.containerd.run_image(&reference, "overlayfs", "full", &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            // containerd's own pull finds everything there.
            let already = registry.requests().len();
            node.containerd.pull(&Pull::new(&reference, "overlayfs"))?;
            let mut asked = registry.asked_by_containerd(already);
            // The other platform's manifest and config are another image.
            asked.retain(|(_, path)| {
                !image.foreign.iter().any(|blob| path.ends_with(&blob.digest.to_string()))
            });
            anyhow::ensure!(only_one_head(&asked), "{asked:?}");
            for layer in &image.layers {
                let ours = cached(&node.skimmerd.root(), &layer.blob.digest);
                anyhow::ensure!(std::fs::metadata(&ours)?.nlink() == 2, "{}", ours.display());
            }
            // What containerd no longer needs is skimmer's alone.
            for name in [&by_digest, &reference] {
                node.containerd.remove_image(name)?;
            }
            for layer in &image.layers {
                let digest = layer.blob.digest;
                command::wait_for("containerd lets go of a blob", PATIENCE, || {
                    (!stored(&node.containerd, &digest).exists()).then_some(())
                })?;
                let ours = std::fs::read(cached(&node.skimmerd.root(), &digest))?;
                anyhow::ensure!(Digest::of(&ours) == digest, "{digest} has other bytes");
            }
            Ok(())
        });
    }
}

#[test]
fn kubernetes_sees_a_full_pull() {
    for version in VERSIONS {
        scenario(&format!("pull-full-cri-{version:?}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "content/pod")?;
            let reference = registry.add(&image)?;
            let pause_image = Some(registry.add(&pause(scenario)?)?);
            let setup = Setup { pause_image, plain_pods: true, ..Setup::default() };
            let node = Node::start_with(scenario, version, &setup)?;
            node.skimmerd.ask(&["pull", "--full", &reference, "--namespace", "k8s.io"])?;
            let mut cri = Cri::connect(&node.containerd.address())?;
            command::wait_for("CRI sees the image", PATIENCE, || {
                cri.images().ok()?.contains(&reference).then_some(())
            })?;
            let pod = cri.run_pod("pod", &scenario.path("pods"))?;
            let container = cri.start(&pod, &reference, &["sleep", "100000"])?;
            let output = cri.exec(&container, &["echo", "hello"])?;
            anyhow::ensure!(output == "hello\n", "the container said {output:?}");
            cri.remove_pod(&pod)
        });
    }
}

#[test]
fn where_blobs_cannot_be_linked_they_are_copied_or_sent() {
    let isolated =
        "[plugins.'io.containerd.metadata.v1.bolt']\ncontent_sharing_policy = 'isolated'\n";
    for (name, tmpfs, more, how) in
        [("copied", true, "", "copied"), ("sent", false, isolated, "streamed")]
    {
        scenario(&format!("content-{name}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "content/elsewhere")?;
            let reference = registry.add(&image)?;
            let root = scenario.path("containerd/root");
            let disk = tmpfs.then(|| mounts::mount("tmpfs", "tmpfs", &[], &root)).transpose()?;
            let setup = Setup { more: more.to_owned(), ..Setup::default() };
            let node = Node::start_with(scenario, Version::V2, &setup)?;
            node.skimmerd.ask(&["pull", "--full", &reference])?;
            for layer in &image.layers {
                let digest = layer.blob.digest;
                let bytes = std::fs::read(stored(&node.containerd, &digest))?;
                anyhow::ensure!(Digest::of(&bytes) == digest, "{digest} has other bytes");
            }
            let log = node.skimmerd.log();
            anyhow::ensure!(log.contains(&format!("\"{how}\":2")), "not {how}");
            node.containerd.run_image(&reference, "overlayfs", "full", &["true"])?;
            drop(node);
            drop(disk);
            Ok(())
        });
    }
}

/// The program that containerd calls, set up as an operator would.
fn install_verifier(scenario: &Scenario, timeout: &str) -> anyhow::Result<String> {
    let folder = scenario.path("verifiers");
    std::fs::create_dir_all(&folder)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../install/skimmer-verifier");
    let settings = format!(
        "#!/bin/sh\nexport SKIMMER={} SKIMMER_ADDRESS={} SKIMMER_VERIFIER_TIMEOUT={timeout}\n\
         exec {} \"$@\"\n",
        tools::built("skimmer")?.display(),
        skimmerd::address_of(scenario, "skimmerd").display(),
        script.display()
    );
    let program = folder.join("skimmer");
    std::fs::write(&program, settings)?;
    command::run("chmod", ["+x".as_ref(), program.as_os_str()])?;
    Ok(format!(
        "[plugins.'io.containerd.image-verifier.v1.bindir']\nbin_dir = '{}'\nper_verifier_timeout = '60s'\n",
        folder.display()
    ))
}

#[test]
fn with_the_verifier_an_ordinary_pull_asks_the_registry_for_one_head() {
    scenario("verifier", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = indexed(scenario, "content/verified", Format::Gzip)?;
        let reference = registry.add(&image)?;
        // What containerd has in one namespace it doesn't fetch for another.
        let others = indexed(scenario, "content/verified-pod", Format::Zstd)?;
        let of_pod = registry.add(&others)?;
        let more = install_verifier(scenario, "50s")?;
        let pause_image = Some(registry.add(&pause(scenario)?)?);
        let setup = Setup { more, pause_image, plain_pods: true, ..Setup::default() };
        let node = Node::start_with(scenario, Version::V2, &setup)?;

        node.containerd.pull(&Pull::new(&reference, "overlayfs"))?;
        check_verified(&registry, 0, &node, &image).context("ctr")?;
        node.containerd.run_image(&reference, "overlayfs", "verified", &["true"])?;

        let already = registry.requests().len();
        let mut cri = Cri::connect(&node.containerd.address())?;
        cri.pull(&of_pod, None)?;
        check_verified(&registry, already, &node, &others).context("CRI")
    });
}

/// An image that an index leads to. In another format it has other blobs, busybox's too.
fn indexed(scenario: &Scenario, name: &str, format: Format) -> anyhow::Result<Image> {
    let file = name.replace('/', "-");
    let layers = vec![busybox(scenario, format)?, data(scenario, &file, 8 << 20, format)?];
    let mut plan = Plan::new(name, layers);
    plan.index = true;
    plan.build(&blobs(scenario))
}

/// After the first `already` requests, containerd asked the registry what the tag leads to and for no more; the rest
/// came once, and is there once.
fn check_verified(
    registry: &Registry,
    already: usize,
    node: &Node,
    image: &Image,
) -> anyhow::Result<()> {
    registry.settle()?;
    let asked = registry.asked_by_containerd(already);
    anyhow::ensure!(only_one_head(&asked), "{asked:?}");
    let sent = registry.sent_of(image);
    anyhow::ensure!(sent.bytes == image.compressed_bytes(), "{sent:?}");
    // What waits for pulls in a namespace of its own is the same file again.
    check_linked(node, image)
}

fn only_one_head(asked: &[(String, String)]) -> bool {
    asked.len() == 1 && asked[0].0 == "HEAD"
}

#[test]
fn the_verifier_never_keeps_a_pull_from_going_on() {
    scenario("verifier-without-skimmerd", |scenario| {
        let registry = Registry::start(scenario)?;
        let image = small(scenario, "content/unverified")?;
        let reference = registry.add(&image)?;
        let more = install_verifier(scenario, "5s")?;
        let setup = containerd::Setup { more, ..containerd::Setup::default() };
        let own = Containerd::start_with(scenario, "containerd", Version::V2, &setup)?;
        own.pull(&Pull::new(&reference, "overlayfs"))?;
        own.run_image(&reference, "overlayfs", "own", &["true"])?;
        // Nor does one that doesn't answer.
        own.remove_image(&reference)?;
        let setup = skimmerd::Setup::default();
        let skimmerd = Skimmerd::start(scenario, "skimmerd", &own.address(), &setup)?;
        let process = Pid::from_raw(skimmerd.id().context("skimmerd doesn't run")?.try_into()?);
        kill(process, Signal::SIGSTOP)?;
        let began = Instant::now();
        let pulled = own.pull(&Pull::new(&reference, "overlayfs"));
        kill(process, Signal::SIGCONT)?;
        pulled?;
        let took = began.elapsed().as_secs();
        // It is asked for as long as it may take, and containerd's own limit is a minute.
        anyhow::ensure!((5..60).contains(&took), "the pull took {took} s");
        // Called wrongly, too.
        let verifier = scenario.path("verifiers/skimmer");
        for arguments in [&[][..], &["-name"], &["-name", "%", "-digest", "x"]] {
            command::run(&verifier, arguments)?;
        }
        Ok(())
    });
}

#[test]
fn complete_images_are_materialized_by_themselves_where_that_is_set() {
    for (name, background) in [("background", Some(Duration::from_millis(100))), ("through", None)]
    {
        scenario(&format!("on-complete-{name}"), |scenario| {
            let registry = Registry::start(scenario)?;
            let image = small(scenario, "content/complete")?;
            let reference = registry.add(&image)?;
            let skimmerd =
                skimmerd::Setup { materialize: true, background, ..skimmerd::Setup::default() };
            let setup = Setup { skimmerd, ..Setup::default() };
            let mut node = Node::start_with(scenario, Version::V2, &setup)?;
            if background.is_some() {
                indexes::learn(scenario, &mut node, &[(&image, &reference)])?;
            }
            node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
            node.containerd.start_image(&reference, "skimmer", "long", &["sleep", "100000"])?;
            command::wait_for("every blob is in the content store", PATIENCE, || {
                check_linked(&node, &image).ok()
            })?;
            let sent = registry.sent_of(&image);
            anyhow::ensure!(sent.bytes == sent.by_daemon, "containerd fetched layers: {sent:?}");
            node.containerd.remove_container("long")?;
            node.containerd.collect_garbage(&reference)?;
            check_linked(&node, &image)
        });
    }
}

#[test]
fn an_image_of_layers_that_were_complete_before_is_materialized_too() {
    scenario("on-complete-before", |scenario| {
        let registry = Registry::start(scenario)?;
        let first = small(scenario, "content/before")?;
        let reference = registry.add(&first)?;
        let mut plan = Plan::new("content/after", first.layers.clone());
        plan.author = "somebody else".to_owned();
        let second = plan.build(&blobs(scenario))?;
        let others = registry.add(&second)?;
        let skimmerd = skimmerd::Setup { materialize: true, ..skimmerd::Setup::default() };
        let setup = Setup { skimmerd, ..Setup::default() };
        let node = Node::start_with(scenario, Version::V2, &setup)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        command::wait_for("the first image is in the content store", PATIENCE, || {
            check_linked(&node, &first).ok()
        })?;
        // After the looks that soon follow the first image's news there is none for a minute, but for other news.
        std::thread::sleep(Duration::from_secs(16));
        let before = registry.sent_of(&second);

        // In a namespace of its own it has none of the blobs yet.
        let hosts = node.containerd.hosts().display().to_string();
        let other = ["--namespace", "other"];
        let pull = ["image", "pull", "--snapshotter", "skimmer", "--hosts-dir"];
        ctr(&node, &[&other[..], &pull[..], &[hosts.as_str(), others.as_str()]].concat())?;
        command::wait_for(
            "the second image is in the content store",
            Duration::from_secs(30),
            || {
                let list = [&other[..], &["content", "list", "--quiet"]].concat();
                let listed = ctr(&node, &list).ok()?;
                let is_there = |digest: Digest| listed.contains(&digest.to_string());
                second.layers.iter().all(|layer| is_there(layer.blob.digest)).then_some(())
            },
        )?;
        check_linked(&node, &second)?;
        anyhow::ensure!(registry.sent_of(&second) == before, "its blobs were fetched again");
        Ok(())
    });
}
