//! Layers with a table of contents inside: the image author's word, to be trusted or not.

use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use skimmer_integration::command::{self, PATIENCE, failure_of, wait_for};
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::node::{self, Node};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::skimmerd::{self, MountMode};
use skimmer_integration::tar::{Header, Tar};
use skimmer_integration::tree::{self, Tree};
use skimmer_integration::world::drop_caches;
use skimmer_integration::{estargz, zstd_chunked};
use skimmer_proto::Digest;

use crate::fixtures::{blobs, busybox, mount_point};
use crate::indexes;

#[test]
fn estargz_is_mounted_at_once_where_trusted() {
    scenario("toc-estargz", |scenario| trusted(scenario, &estargz_image(scenario)?));
}

#[test]
fn zstd_chunked_is_mounted_at_once_where_trusted() {
    scenario("toc-zstd-chunked", |scenario| trusted(scenario, &zstd_chunked_image(scenario)?));
}

#[test]
fn estargz_is_proved_before_it_is_mounted_where_not() {
    scenario("toc-estargz-distrusted", |scenario| distrusted(scenario, &estargz_image(scenario)?));
}

#[test]
fn zstd_chunked_is_proved_before_it_is_mounted_where_not() {
    scenario("toc-zstd-chunked-distrusted", |scenario| {
        distrusted(scenario, &zstd_chunked_image(scenario)?)
    });
}

#[test]
fn readers_of_estargz_wait_for_the_next_daemon() {
    scenario("toc-estargz-takeover", |scenario| taken_over(scenario, &estargz_image(scenario)?));
}

#[test]
fn readers_of_zstd_chunked_wait_for_the_next_daemon() {
    scenario("toc-zstd-chunked-takeover", |scenario| {
        taken_over(scenario, &zstd_chunked_image(scenario)?)
    });
}

/// An image and what it unpacks to.
struct Subject {
    image: Image,
    tree: Tree,
    unpacked: PathBuf,
}

impl Subject {
    /// An image of busybox and `layer`; `twin` has the same tree, in a form that umoci reads.
    fn new(scenario: &Scenario, name: &str, layer: Layer, twin: Layer) -> anyhow::Result<Self> {
        let base = busybox(scenario, Format::Gzip)?;
        let image = Plan::new(name, vec![base.clone(), layer]).build(&blobs(scenario))?;
        let twin = Plan::new(name, vec![base, twin]).build(&blobs(scenario))?;
        let unpacked = twin.unpack(&scenario.path("umoci"))?;
        Ok(Self { image, tree: tree::read(&unpacked)?, unpacked })
    }
}

fn estargz_image(scenario: &Scenario) -> anyhow::Result<Subject> {
    let (first, second) = (noise(31, 6 << 20), noise(32, 3_000_001));
    let files: [(&str, &[u8]); 5] = [
        ("data/", b""),
        ("data/empty", b""),
        ("data/a", &first),
        ("data/b", &second),
        ("data/c", b"short"),
    ];
    let layer = estargz::layer(&files, &blobs(scenario))?;
    Subject::new(scenario, "toc/estargz", layer.clone(), layer)
}

fn zstd_chunked_image(scenario: &Scenario) -> anyhow::Result<Subject> {
    let tar = Tar::new()
        .dir("data/")
        .file("data/empty", b"")
        .file("data/a", &noise(33, 6 << 20))
        .entry(Header { mode: 0o4755, ..Header::new("data/b", b'0') }, &noise(34, 3_000_001))
        .file("data/c", b"short")
        .file("data/zeros", &[0; 1 << 20])
        .pax(&[("mtime", b"1600000001.25"), ("SCHILY.xattr.user.colour", b"blue")])
        .file("data/told", b"attributes")
        .hard_link("data/hard", "data/a")
        .symlink("data/soft", "../bin")
        .device("data/device", b'3', 1, 3)
        .file("etc/.wh.gone", b"")
        .end();
    let layer = zstd_chunked::layer(&tar, &blobs(scenario))?;
    let twin = Layer::of(&tar, Format::Gzip, &blobs(scenario))?;
    Subject::new(scenario, "toc/zstd-chunked", layer, twin)
}

fn start(scenario: &Scenario, name: &str, trust_toc: bool) -> anyhow::Result<Node> {
    let skimmerd = skimmerd::Setup { trust_toc, ..skimmerd::Setup::default() };
    let setup = node::Setup { name: name.to_owned(), skimmerd, ..node::Setup::default() };
    Node::start_with(scenario, Version::V2, &setup)
}

/// The bytes of the layer with the table that were sent so far; all to skimmerd.
fn sent(registry: &Registry, image: &Image) -> anyhow::Result<u64> {
    let sent = registry.sent(&image.layers[1].blob.digest);
    anyhow::ensure!(sent.by_daemon == sent.bytes, "containerd fetched it: {sent:?}");
    Ok(sent.bytes)
}

/// Runs a container that reads one small file of a pulled image, for which little may be fetched.
fn read_a_little(
    node: &Node,
    registry: &Registry,
    image: &Image,
    reference: &str,
) -> anyhow::Result<()> {
    let before = sent(registry, image)?;
    let text = node.containerd.run_image(reference, "skimmer", "short", &["cat", "/data/c"])?;
    anyhow::ensure!(text == "short", "/data/c holds {text:?}");
    let (fetched, size) = (sent(registry, image)? - before, image.layers[1].blob.size);
    // The kernel asks for whole pages: what shares the file's page, the end of a large file, comes along.
    let bound = if MountMode::of_this_run() == MountMode::Kernel { size / 3 } else { size / 8 };
    anyhow::ensure!(fetched <= bound, "{fetched} of {size} bytes were fetched for 5");
    Ok(())
}

fn compare(scenario: &Scenario, node: &Node, subject: &Subject, how: &str) -> anyhow::Result<()> {
    let view = node.view(&subject.image, &mount_point(scenario, how))?;
    let mut actual = tree::read(view.path())?;
    // The root has no entry in the layers.
    if let (Some(entry), Some(wanted)) = (actual.get_mut(&b""[..]), subject.tree.get(&b""[..])) {
        entry.time = wanted.time;
    }
    let differences = tree::differences(&subject.tree, &actual);
    anyhow::ensure!(differences.is_empty(), "{how}:\n{}", differences.join("\n"));
    Ok(())
}

fn trusted(scenario: &Scenario, subject: &Subject) -> anyhow::Result<()> {
    let (image, layer) = (&subject.image, &subject.image.layers[1]);
    let registry = Registry::start(scenario)?;
    let reference = registry.add(image)?;
    let node = start(scenario, "", true)?;
    node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    let mounted = sent(&registry, image)?;
    anyhow::ensure!(mounted > 0, "nobody looked at the layer");
    anyhow::ensure!(mounted <= layer.blob.size / 8, "{mounted} bytes were fetched for the mount");
    read_a_little(&node, &registry, image, &reference)?;
    compare(scenario, &node, subject, "by-toc")?;

    // Completed, it is like any other layer, also to who trusts no table.
    let view = node.view(image, &mount_point(scenario, "before"))?;
    node.skimmerd.ask(&["fetch", &reference])?;
    let total = sent(&registry, image)?;
    anyhow::ensure!(total == layer.blob.size, "{total} bytes of {}", layer.blob.size);
    compare(scenario, &node, subject, "by-index")?;
    anyhow::ensure!(std::fs::read(view.path().join("data/c"))? == b"short", "the older view");
    drop(view);
    let files = indexes::export(scenario, &node, image)?;
    let other = start(scenario, "other-", false)?;
    indexes::import(&other, &files)?;
    other.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    read_a_little(&other, &registry, image, &reference)
}

const READER: &str = "reader";

/// Begins to read a file in the container [`READER`]; what comes of it is the file's MD5 sum.
fn begin_reading(node: &Node, file: &str) -> anyhow::Result<JoinHandle<anyhow::Result<String>>> {
    let mut reader = node.containerd.exec_command(READER, &["md5sum", file])?;
    Ok(thread::spawn(move || command::output_of(&mut reader, PATIENCE)))
}

fn finish_reading(
    subject: &Subject,
    reader: JoinHandle<anyhow::Result<String>>,
    file: &str,
) -> anyhow::Result<()> {
    let said = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    let expected = command::run("md5sum", [subject.unpacked.join(file.trim_start_matches('/'))])?;
    let sum = |said: &str| said.split(' ').next().unwrap_or_default().to_owned();
    anyhow::ensure!(sum(&said) == sum(&expected), "{file}: {said:?} instead of {expected:?}");
    Ok(())
}

fn taken_over(scenario: &Scenario, subject: &Subject) -> anyhow::Result<()> {
    let mut registry = Registry::start(scenario)?;
    let reference = registry.add(&subject.image)?;
    let skimmerd = skimmerd::Setup {
        trust_toc: true,
        holder: true,
        deadline: Duration::from_secs(60),
        ..skimmerd::Setup::default()
    };
    let setup = node::Setup { skimmerd, ..node::Setup::default() };
    let mut node = Node::start_with(scenario, Version::V2, &setup)?;
    node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    node.containerd.start_image(&reference, "skimmer", READER, &["sleep", "100000"])?;
    let in_kernel = MountMode::of_this_run() == MountMode::Kernel;
    let images = node.skimmerd.ask(&["status", &reference])?;
    let server = &images[0]["layers"][1]["server"];
    anyhow::ensure!(server == if in_kernel { "kernel" } else { "fuse" }, "{images}");

    registry.stop()?;
    let early = begin_reading(&node, "/data/a")?;
    // The daemon has taken the read and asks a registry that isn't there.
    thread::sleep(Duration::from_secs(2));
    node.skimmerd.kill()?;
    let late = begin_reading(&node, "/data/b")?;
    thread::sleep(Duration::from_secs(1));
    anyhow::ensure!(!early.is_finished() && !late.is_finished(), "nobody could have answered them");
    registry.resume()?;
    node.skimmerd.run()?;
    finish_reading(subject, early, "/data/a")?;
    finish_reading(subject, late, "/data/b")?;

    // Once the layer has an index, the mount goes on showing it by the table, also when it is left once more.
    node.skimmerd.ask(&["fetch", &reference])?;
    let wait = "exec 3< /data/a; : > /open; while [ ! -e /go ]; do sleep 0.1; done; md5sum <&3";
    let mut holder = node.containerd.exec_command(READER, &["sh", "-c", wait])?;
    let held = thread::spawn(move || command::output_of(&mut holder, PATIENCE));
    wait_for("the open file", PATIENCE, || node.containerd.exec(READER, &["cat", "/open"]).ok())?;
    node.skimmerd.kill()?;
    registry.stop()?;
    node.skimmerd.run()?;
    drop_caches()?;
    node.containerd.exec(READER, &["sh", "-c", ": > /go"])?;
    finish_reading(subject, held, "/data/a")?;
    finish_reading(subject, begin_reading(&node, "/data/b")?, "/data/b")?;
    node.containerd.remove_container(READER)
}

fn distrusted(scenario: &Scenario, subject: &Subject) -> anyhow::Result<()> {
    let (image, layer) = (&subject.image, &subject.image.layers[1]);
    let registry = Registry::start(scenario)?;
    let reference = registry.add(image)?;
    let mut node = start(scenario, "", false)?;
    indexes::learn(scenario, &mut node, &[(image, &reference)])?;
    let proved = sent(&registry, image)?;
    anyhow::ensure!(proved == layer.blob.size, "{proved} bytes of {}", layer.blob.size);
    node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    read_a_little(&node, &registry, image, &reference)?;
    compare(scenario, &node, subject, "by-index")?;

    let fresh = start(scenario, "fresh-", false)?;
    fresh.containerd.pull(&Pull::new(&reference, "skimmer"))?;
    let pulled = sent(&registry, image)?;
    anyhow::ensure!(pulled >= 2 * layer.blob.size, "{pulled} bytes: it wasn't proved");
    compare(scenario, &fresh, subject, "pulled-through")
}

#[test]
fn a_table_that_lies_is_found_out() {
    scenario("toc-lie", |scenario| {
        let registry = Registry::start(scenario)?;
        let (honest, small) = (noise(35, 3 << 20), noise(36, 300_000));
        let files: [(&str, &[u8]); 3] = [("data/", b""), ("data/a", &honest), ("data/b", &small)];
        // It claims that /data/a has other contents.
        let claim = Digest::of(b"other contents").to_string();
        let lie = |table: &mut [serde_json::Value]| table[1]["chunkDigest"] = claim.into();
        let layer = estargz::lying(&files, lie, &blobs(scenario))?;
        let digest = layer.blob.digest.to_string();
        let image = Plan::new("toc/lie", vec![busybox(scenario, Format::Gzip)?, layer])
            .build(&blobs(scenario))?;
        let reference = registry.add(&image)?;
        let shown = |node: &Node, name: &str| {
            let view = node.view(&image, &mount_point(scenario, name))?;
            let truth = std::fs::read(view.path().join("data/a"))? == honest;
            anyhow::ensure!(truth, "{name}: /data/a holds something else");
            anyhow::Ok(())
        };
        let sober = start(scenario, "sober-", false)?;
        sober.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        shown(&sober, "sober")?;

        let node = start(scenario, "", true)?;
        node.skimmerd.expect_log("a reader got an I/O error");
        node.skimmerd.expect_log("a layer in use is not what it was taken for");
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let run = |id: &str, file: &str| {
            node.containerd.run_image(&reference, "skimmer", id, &["wc", "-c", file])
        };
        let size = run("other", "/data/b")?;
        anyhow::ensure!(size.trim_start().starts_with("300000"), "/data/b: {size:?}");
        anyhow::ensure!(run("reader", "/data/a").is_err(), "the lie was read");
        let error = failure_of(&mut node.skimmerd.skimmer(&["fetch", &reference])?, PATIENCE)?;
        let log = node.skimmerd.log();
        let line = |part: &str| log.lines().find(|line| line.contains(part)).unwrap_or_default();
        for text in [
            error.as_str(),
            line("a reader got an I/O error"),
            line("a layer in use is not what it was taken for"),
        ] {
            for part in [&digest, "toc/lie", "content"] {
                anyhow::ensure!(text.contains(part), "{part:?} is missing from {text:?}");
            }
        }
        // The failure is answered from memory for a moment; then the layer is tried again, by its own index.
        node.skimmerd.expect_log("request failed");
        wait_for("the truth", PATIENCE, || shown(&node, "found-out").ok())
    });
}
