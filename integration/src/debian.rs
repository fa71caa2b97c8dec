//! Real images: Debian with Python and numpy, made by debootstrap once and kept outside the checkout.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use flate2::read::GzDecoder;
use serde::{Deserialize, Serialize};
use skimmer_proto::Digest;

use crate::command;
use crate::image::{Image, Plan};
use crate::layer::{Blob, Format, Layer};
use crate::tools;

/// Folders that get a layer of their own, above the one with everything else; the last one that matches counts.
const LAYERS: [&[&str]; 6] = [
    &[],
    &["usr/lib/x86_64-linux-gnu", "usr/lib/gcc"],
    &["usr/share", "usr/include"],
    &["usr/bin", "usr/sbin", "etc", "var"],
    &["usr/lib/python3.11"],
    &["usr/lib/python3"],
];

/// The command whose first line of output says that numpy was imported.
pub const COMMAND: [&str; 3] = ["python3", "-c", "import numpy; print(1)"];

/// A file of several hundred MB in [`single_layer`]: everything below `usr/lib`, as a tar archive.
pub const LARGE_FILE: &str = "opt/lib.tar";

#[derive(Serialize, Deserialize)]
struct Record {
    /// Blob and DiffID, bottom layer first.
    layers: Vec<(String, String)>,
}

/// Debian, Python and numpy in six gzip layers, more than 300 MB uncompressed; runs [`COMMAND`].
///
/// The first call takes minutes.
pub fn numpy(folder: &Path) -> anyhow::Result<Image> {
    let layers = cached(
        "layers-v5",
        &["--include=python3-numpy,locales,curl,ca-certificates"],
        |root, into| {
            let lists = split(root)?;
            lists.iter().enumerate().map(|(number, list)| pack(root, list, into, number)).collect()
        },
    )?;
    plan("debian/numpy", layers).build(folder)
}

/// Debian, Python, numpy and LLVM in a single gzip layer of more than 1 GB uncompressed, [`LARGE_FILE`] included.
pub fn single_layer(folder: &Path) -> anyhow::Result<Image> {
    let layers = cached(
        "single-v1",
        &["--variant=minbase", "--include=python3-numpy,llvm-14-dev"],
        |root, into| {
            std::fs::create_dir_all(root.join("opt"))?;
            let mut call = Command::new("tar");
            call.arg("--create")
                .arg("--directory")
                .arg(root)
                .arg("--file")
                .arg(root.join(LARGE_FILE));
            command::output_of(call.arg("usr/lib"), Duration::from_secs(600))
                .context("make the large file")?;
            let all = root_entries(root)?;
            Ok(vec![pack(root, &all, into, 0)?])
        },
    )?;
    plan("debian/single", layers).build(folder)
}

/// The files of [`numpy`], without its hard links, spread over `count` gzip layers. Not every program in it runs.
pub fn many_layers(folder: &Path, count: usize) -> anyhow::Result<Image> {
    let whole = numpy(folder)?;
    let (mut total, mut tars) = (0, Vec::new());
    for layer in &whole.layers {
        let mut tar = Vec::new();
        GzDecoder::new(std::fs::File::open(&layer.blob.path)?).read_to_end(&mut tar)?;
        total += tar.len();
        tars.push(tar);
    }
    let mut builders: Vec<_> = (0..count).map(|_| tar::Builder::new(Vec::new())).collect();
    for (number, builder) in builders.iter_mut().enumerate() {
        // A file longer than a layer would leave the next ones empty, hence equal.
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(0);
        builder.append_data(&mut header, format!("layer-{number}"), std::io::empty())?;
    }
    let mut before = 0;
    for tar in &tars {
        let mut archive = tar::Archive::new(&tar[..]);
        for entry in archive.entries()? {
            let entry = entry?;
            let at = before + usize::try_from(entry.raw_header_position())?;
            append(&mut builders[at * count / total], entry)?;
        }
        before += tar.len();
    }
    let layers: anyhow::Result<Vec<Layer>> = builders
        .into_iter()
        .map(|builder| Layer::of(&builder.into_inner()?, Format::Gzip, folder))
        .collect();
    plan("debian/many", layers?).build(folder)
}

/// Copies one entry, unless it is a hard link, whose target may be in another layer.
fn append(builder: &mut tar::Builder<Vec<u8>>, entry: tar::Entry<'_, &[u8]>) -> anyhow::Result<()> {
    let path = entry.path()?.into_owned();
    let mut header = entry.header().clone();
    match (header.entry_type(), entry.link_name()?) {
        (tar::EntryType::Link, _) => {}
        (tar::EntryType::Symlink, Some(target)) => {
            builder.append_link(&mut header, path, target)?
        }
        _ => builder.append_data(&mut header, path, entry)?,
    }
    Ok(())
}

fn plan(name: &str, layers: Vec<Layer>) -> Plan {
    let mut plan = Plan::new(name, layers);
    plan.command = COMMAND.iter().map(|&part| part.to_owned()).collect();
    plan
}

/// The layers that `make` makes of what debootstrap makes with `options`, from the cache if they are there.
/// `edition` changes whenever what is made changes.
fn cached(
    edition: &str,
    options: &[&str],
    make: impl FnOnce(&Path, &Path) -> anyhow::Result<Vec<Layer>>,
) -> anyhow::Result<Vec<Layer>> {
    let folder = tools::cache().join("images").join(format!("debian-{edition}"));
    let record = folder.join("record.json");
    if !record.exists() {
        let building =
            tools::cache().join("images").join(format!(".debian-{edition}-{}", std::process::id()));
        std::fs::create_dir_all(&building)?;
        let root = debootstrap(&building, options)?;
        let layers = make(&root, &building)?;
        command::run("rm", ["-rf".as_ref(), root.as_os_str()])?;
        let layers =
            layers.iter().map(|l| (l.blob.digest.to_string(), l.diff_id.to_string())).collect();
        std::fs::write(building.join("record.json"), serde_json::to_vec(&Record { layers })?)?;
        // Someone else may have been faster; theirs is as good.
        let _ = std::fs::rename(&building, &folder);
        let _ = std::fs::remove_dir_all(&building);
    }
    let record: Record = serde_json::from_slice(&std::fs::read(&record)?)?;
    let load = |(blob, diff_id): &(String, String)| -> anyhow::Result<Layer> {
        let digest: Digest = blob.parse()?;
        let path = folder.join(digest.hex());
        let size =
            std::fs::metadata(&path).with_context(|| format!("find {}", path.display()))?.len();
        Ok(Layer {
            blob: Blob { digest, size, path },
            diff_id: diff_id.parse()?,
            format: Format::Gzip,
            annotations: BTreeMap::new(),
        })
    };
    record.layers.iter().map(load).collect()
}

/// Debian's root file system below `folder`, from this machine's own mirror.
fn debootstrap(folder: &Path, options: &[&str]) -> anyhow::Result<PathBuf> {
    let root = folder.join("root");
    let mirror = tools::script("debian-mirror")?.first().context("no Debian mirror")?.clone();
    let mut call = Command::new("debootstrap");
    call.args(options).arg("bookworm").arg(&root).arg(mirror);
    command::output_of(&mut call, Duration::from_secs(1800)).context("debootstrap")?;
    for folder in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        command::run(
            "find",
            [root.join(folder).as_os_str(), "-type".as_ref(), "f".as_ref(), "-delete".as_ref()],
        )?;
    }
    Ok(root)
}

/// Every path of the tree belongs to one layer; parents come first.
fn split(root: &Path) -> anyhow::Result<Vec<Vec<String>>> {
    let mut lists: Vec<Vec<String>> = vec![Vec::new(); LAYERS.len()];
    for path in root_entries(root)? {
        let within = |prefix: &str| {
            path == prefix || path.strip_prefix(prefix).is_some_and(|rest| rest.starts_with('/'))
        };
        let layer = LAYERS
            .iter()
            .rposition(|prefixes| prefixes.iter().any(|prefix| within(prefix)))
            .unwrap_or(0);
        lists[layer].push(path);
    }
    Ok(lists)
}

/// All paths below `root`, relative, sorted.
fn root_entries(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut find = Command::new("find");
    find.current_dir(root).args([".", "-mindepth", "1", "-printf", "%P\\n"]);
    let listing = command::output_of(&mut find, command::PATIENCE)?;
    let mut paths: Vec<String> = listing.lines().map(str::to_owned).collect();
    paths.sort();
    Ok(paths)
}

/// Packs `paths` into one layer, compressed with zlib's default level as registries' images are.
fn pack(root: &Path, paths: &[String], into: &Path, number: usize) -> anyhow::Result<Layer> {
    let list = into.join(format!("{number}.list"));
    let tar = into.join(format!("{number}.tar"));
    std::fs::write(&list, paths.join("\n"))?;
    let mut call = Command::new("tar");
    call.args(["--create", "--numeric-owner", "--no-recursion", "--format=pax", "--xattrs"]);
    call.args(["--pax-option=delete=atime,delete=ctime", "--directory"]).arg(root);
    call.arg("--files-from").arg(&list).arg("--file").arg(&tar);
    command::output_of(&mut call, Duration::from_secs(600)).context("pack a layer")?;
    let diff_id = Blob::of_file(&tar)?.digest;
    let mut gzip = Command::new("gzip");
    gzip.args(["-6", "--no-name"]).arg(&tar);
    command::output_of(&mut gzip, Duration::from_secs(1200)).context("compress a layer")?;
    let packed = Blob::of_file(&into.join(format!("{number}.tar.gz")))?;
    let path = into.join(packed.digest.hex());
    std::fs::rename(&packed.path, &path)?;
    std::fs::remove_file(&list)?;
    let (blob, format) = (Blob { path, ..packed }, Format::Gzip);
    Ok(Layer { blob, diff_id, format, annotations: BTreeMap::new() })
}
