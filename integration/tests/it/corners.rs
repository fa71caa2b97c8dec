//! Every corner of tar: what a lazily mounted layer shows is what `umoci unpack` makes of it.

mod tars;

use std::path::Path;

use anyhow::Context as _;
use skimmer_integration::containerd::{Containerd, Version};
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer};
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::snapshots::Snapshots;
use skimmer_integration::tar::Tar;
use skimmer_integration::tree::{self, Tree};

use self::tars::{
    attributes, base_256, before_1970, kinds, link_header, long_names, many_entries, odd_paths,
    old_types, overrides, replacements, root, sizes, sparse_gnu, sparse_pax, times, trusted,
    whiteouts,
};
use crate::fixtures::{blobs, mount_point};
use crate::indexes;

/// One way in which a layer can be odd.
pub struct Corner {
    name: &'static str,
    /// The layers, bottom first.
    tars: Vec<Vec<u8>>,
    format: Format,
    /// What means the same in words that umoci understands, where it doesn't understand `tars`.
    plain: Option<Vec<u8>>,
    /// Paths whose times umoci makes up: directories that no entry describes. The root is one of them.
    timeless: &'static [&'static str],
    /// containerd's own unpacking refuses it, or does something else than umoci's.
    umoci_only: bool,
}

impl Corner {
    fn new(name: &'static str, tar: Tar) -> Self {
        Self {
            name,
            tars: vec![tar.end()],
            format: Format::Gzip,
            plain: None,
            timeless: &[],
            umoci_only: false,
        }
    }

    fn image(&self, scenario: &Scenario) -> anyhow::Result<Image> {
        let folder = blobs(scenario);
        let layers = self.tars.iter().map(|tar| Layer::of(tar, self.format, &folder));
        let mut plan =
            Plan::new(&format!("corners/{}", self.name), layers.collect::<Result<_, _>>()?);
        plan.author = self.name.into();
        plan.build(&folder)
    }

    fn expected(&self, scenario: &Scenario) -> anyhow::Result<Tree> {
        let folder = scenario.path("umoci").join(self.name);
        let tars =
            self.plain.as_ref().map_or_else(|| self.tars.clone(), |plain| vec![plain.clone()]);
        // umoci knows neither zstd nor Docker's types.
        let layers = tars.iter().map(|tar| Layer::of(tar, Format::Gzip, &folder));
        let twin = Plan::new("twin", layers.collect::<Result<_, _>>()?).build(&folder)?;
        tree::read(&twin.unpack(&folder)?)
    }
}

#[test]
fn lazy_mounts_show_what_umoci_unpacks() {
    scenario("corners", |scenario| {
        let registry = Registry::start(scenario)?;
        let first = Node::start(scenario, Version::V2)?;
        let point = mount_point(scenario, "view");
        let corners = corners();
        let mut images = Vec::new();
        let mut wrong = Vec::new();
        for corner in &corners {
            let image = corner.image(scenario)?;
            let reference = registry.add(&image)?;
            let expected = corner.expected(scenario).with_context(|| corner.name)?;
            let checked = check(
                &first.containerd,
                "skimmer",
                &image,
                &reference,
                (corner, &expected),
                &point,
            );
            report(&mut wrong, corner, "pulled through", checked);
            images.push((image, expected));
        }
        // A second node that only has the indexes shows the same, with nothing but what is read fetched.
        let exported: Vec<_> =
            images.iter().map(|(image, _)| indexes::export(scenario, &first, image)).collect();
        let second = Node::start_with(
            scenario,
            Version::V2,
            &Setup { name: "second-".into(), ..Setup::default() },
        )?;
        for ((corner, (image, expected)), indexes) in corners.iter().zip(&images).zip(exported) {
            let checked = indexes.and_then(|files| {
                indexes::import(&second, &files)?;
                let reference = registry.reference(image);
                check(&second.containerd, "skimmer", image, &reference, (corner, expected), &point)
            });
            report(&mut wrong, corner, "lazily", checked);
        }
        assert!(wrong.is_empty(), "{} corners are wrong:\n{}", wrong.len(), wrong.join("\n"));
        Ok(())
    });
}

#[test]
fn overlayfs_shows_what_umoci_unpacks() {
    scenario("corners-overlayfs", |scenario| {
        let registry = Registry::start(scenario)?;
        let containerd = Containerd::start(scenario, Version::V2)?;
        let point = mount_point(scenario, "view");
        let mut wrong = Vec::new();
        for corner in corners().iter().filter(|corner| !corner.umoci_only) {
            let image = corner.image(scenario)?;
            let reference = registry.add(&image)?;
            let checked = corner.expected(scenario).and_then(|expected| {
                check(&containerd, "overlayfs", &image, &reference, (corner, &expected), &point)
            });
            report(&mut wrong, corner, "in overlayfs", checked);
        }
        assert!(wrong.is_empty(), "{} corners are wrong:\n{}", wrong.len(), wrong.join("\n"));
        Ok(())
    });
}

fn report(
    wrong: &mut Vec<String>,
    corner: &Corner,
    how: &str,
    checked: anyhow::Result<Vec<String>>,
) {
    match checked {
        Ok(differences) if differences.is_empty() => {}
        Ok(differences) => {
            wrong.push(format!("{} {how}:\n  {}", corner.name, differences.join("\n  ")))
        }
        Err(error) => wrong.push(format!("{} {how}: {error:?}", corner.name)),
    }
}

/// Pulls the image with `snapshotter` and compares what a view of it shows.
fn check(
    containerd: &Containerd,
    snapshotter: &str,
    image: &Image,
    reference: &str,
    (corner, expected): (&Corner, &Tree),
    mount_point: &Path,
) -> anyhow::Result<Vec<String>> {
    containerd.pull(&Pull::new(reference, snapshotter))?;
    let chains = image.chain_ids();
    let snapshots = Snapshots::connect(&containerd.address(), snapshotter)?;
    let view = snapshots.view(chains.last().map_or("", String::as_str), mount_point)?;
    let mut actual = tree::read(view.path())?;
    for path in
        corner.timeless.iter().chain([&""]).filter(|path| !path.is_empty() || corner.name != "root")
    {
        if let (Some(entry), Some(wanted)) =
            (actual.get_mut(path.as_bytes()), expected.get(path.as_bytes()))
        {
            entry.time = wanted.time;
        }
    }
    Ok(tree::differences(expected, &actual))
}

fn corners() -> Vec<Corner> {
    // No two have equal DiffIDs: the second would find the first one's snapshot and never be read.
    let mut all = vec![
        Corner::new("kinds", kinds()),
        Corner { format: Format::Plain, ..Corner::new("uncompressed", kinds().file("u", b"u")) },
        Corner {
            format: Format::GzipMembers(5),
            ..Corner::new("members", kinds().file("m", b"m"))
        },
        Corner { format: Format::Zstd, ..Corner::new("zstd", kinds().file("z", b"z")) },
        Corner::new("sizes", sizes()),
        Corner {
            format: Format::GzipMembers(40),
            ..Corner::new("sizes-members", sizes().file("m", b"m"))
        },
        Corner { format: Format::Zstd, ..Corner::new("sizes-zstd", sizes().file("z", b"z")) },
        Corner {
            format: Format::Plain,
            ..Corner::new("sizes-uncompressed", sizes().file("u", b"u"))
        },
        Corner { timeless: &["p", "n"], ..Corner::new("long-names", long_names()) },
        Corner::new("overrides", overrides()),
        Corner::new("base-256", base_256()),
        sparse_gnu(),
        Corner::new("sparse-pax", sparse_pax()),
        Corner::new("times", times()),
        Corner::new("attributes", attributes()),
        Corner {
            timeless: &["a", "a/b", "a/b/c"],
            ..Corner::new("missing-parents", Tar::new().file("a/b/c/d", b"x"))
        },
        Corner { timeless: &["abs", "up", "a", "a/c"], ..Corner::new("odd-paths", odd_paths()) },
        Corner { umoci_only: true, ..Corner::new("root", root()) },
        Corner::new(
            "not-utf-8",
            Tar::new().file(b"\xff\xfe\x80.bin", b"x").dir(b"d\xc3\x28/").file(b"d\xc3\x28/e", b""),
        ),
        old_types(),
        Corner { umoci_only: true, ..Corner::new("before-1970", before_1970()) },
        Corner { umoci_only: true, ..Corner::new("trusted", trusted()) },
        Corner { umoci_only: true, ..Corner::new("link-header", link_header()) },
        Corner {
            plain: Some(Tar::new().file("f", b"x").end()),
            ..Corner::new("global-pax", Tar::new().global_pax(&[("comment", b"c")]).file("f", b"x"))
        },
        Corner::new("many-entries", many_entries()),
        Corner::new("empty", Tar::new()),
    ];
    all.extend(replacements());
    all.push(Corner { tars: whiteouts(), ..Corner::new("whiteouts", Tar::new()) });
    all
}
