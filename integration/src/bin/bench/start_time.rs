//! How long the daemon takes to start on a node that has been in use.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::json;
use skimmer_integration::containerd::Version;
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::mounts;
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::skimmerd;
use skimmer_integration::snapshots::Snapshots;
use skimmer_integration::tar::Tar;
use skimmer_integration::world::drop_caches;
use skimmer_proto::Digest;

use crate::figure::{Bar, Bench, Figure, Outcome, median, rounded};

pub const FIGURE: Figure = Figure {
    name: "start-time",
    what: "skimmerd's start until /ready and a listing of its snapshots: 2,000 layers cached, 200 mounted before, page cache cold",
    unit: "s",
    bar: Bar::AtMost(2.0),
    aim: 0.5,
    against: None,
    measure,
};

const CACHED: u32 = 2000;
const USED: usize = 200;
/// So much data each cached layer has, in a sparse file.
const DATA_BYTES: u64 = 512 << 20;
/// Layers of one image.
const PER_IMAGE: usize = 100;

fn measure(bench: &Bench<'_>) -> anyhow::Result<Outcome> {
    let registry = Registry::start(bench.scenario)?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let setup = Setup {
        skimmerd: skimmerd::Setup { metrics: port.to_string(), ..skimmerd::Setup::default() },
        ..Setup::default()
    };
    let mut node = Node::start_with(bench.scenario, Version::V2, &setup)?;
    let mut keys = Vec::new();
    for number in 0..USED / PER_IMAGE {
        let image = image(&bench.scenario.path("blobs"), number)?;
        let reference = registry.add(&image)?;
        node.containerd.pull(&Pull::new(&reference, "skimmer"))?;
        let chains = image.chain_ids();
        let key = format!("in-use-{number}");
        let top = chains.last().context("an image without layers")?;
        // containerd would collect it otherwise.
        let root = ("containerd.io/gc.root".to_owned(), "true".to_owned());
        node.snapshots("skimmer")?.prepare(&key, top, HashMap::from([root]))?;
        keys.push(key);
    }
    let used = direct(&node)?.list(&[])?.len();
    cache_more(&node.skimmerd.root().join("cache"))?;
    let (mut values, mut runs) = (Vec::new(), Vec::new());
    for run in 0..bench.runs {
        node.wait_connected()?;
        for key in &keys {
            node.snapshots("skimmer")?.mounts(key)?;
        }
        let mounts = mounts::below(&node.skimmerd.root().join("snapshots/m")).len();
        anyhow::ensure!(mounts >= USED, "only {mounts} layers are mounted");
        node.skimmerd.kill()?;
        drop_caches()?;
        let start = Instant::now();
        node.skimmerd.run()?;
        ready(&port.to_string())?;
        let listed = direct(&node)?.list(&[])?.len();
        let took = start.elapsed().as_secs_f64();
        anyhow::ensure!(listed >= used, "{listed} of {used} snapshots after the start");
        eprintln!("  run {} of {}: {took:.3} s", run + 1, bench.runs);
        values.push(took);
        runs.push(json!({ "value": rounded(took), "mounts_before": mounts }));
    }
    let settings = json!({
        "cached_layers": CACHED, "data_bytes_each": DATA_BYTES, "snapshots": used,
        "ended_by": "kill -9",
    });
    Ok(Outcome { value: median(values), runs, settings })
}

/// skimmerd's own service.
fn direct(node: &Node) -> anyhow::Result<Snapshots> {
    Snapshots::connect(&node.skimmerd.address(), "skimmer")
}

/// Of layers that no other image has.
fn image(folder: &Path, number: usize) -> anyhow::Result<Image> {
    let layer = |layer| {
        let name = format!("image-{number}-layer-{layer}");
        Layer::of(&Tar::new().file(name.clone(), &noise(1, 100_000)).end(), Format::Gzip, folder)
    };
    let layers = (0..PER_IMAGE).map(layer).collect::<anyhow::Result<_>>()?;
    Plan::new(&format!("start/{number}"), layers).build(folder)
}

/// Copies of a layer that is there, under other names: directories as the daemon makes them.
fn cache_more(cache: &Path) -> anyhow::Result<()> {
    let (layers, blobs) = (cache.join("layers-v1"), cache.join("blobs-v1"));
    let sample = first(&layers)?;
    let checkpoint = fs::read(first(&blobs)?.join("pieces"))?;
    for number in 0..CACHED {
        let name = Digest::of(&number.to_be_bytes()).hex();
        let (layer, blob) = (layers.join(&name), blobs.join(&name));
        fs::create_dir_all(&layer)?;
        fs::create_dir_all(&blob)?;
        for part in ["index", "table", "inodes", "chunks"] {
            fs::copy(sample.join(part), layer.join(part))
                .with_context(|| format!("copy {part} of {}", sample.display()))?;
        }
        fs::write(blob.join("pieces"), &checkpoint)?;
        for folder in [&layer, &blob] {
            let data = fs::File::create(folder.join("data"))?;
            data.set_len(DATA_BYTES)?;
            data.write_all_at(b"bytes", 0)?;
        }
    }
    Ok(())
}

fn first(folder: &Path) -> anyhow::Result<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    entries.sort();
    let whole = |path: &&PathBuf| path.join("data").exists();
    entries.iter().find(whole).cloned().with_context(|| format!("nothing in {}", folder.display()))
}

/// Until `/ready` says so.
fn ready(address: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Ok(mut stream) = TcpStream::connect(address) {
            write!(stream, "GET /ready HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            if text.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    anyhow::bail!("skimmerd is never ready")
}
