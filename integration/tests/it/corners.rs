//! Every corner of tar: what a lazily mounted layer shows is what `umoci unpack` makes of it.

use std::path::Path;

use anyhow::Context as _;
use skimmer_integration::containerd::{Containerd, Version};
use skimmer_integration::ctr::Pull;
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::{Format, Layer, noise};
use skimmer_integration::node::{Node, Setup};
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::snapshots::Snapshots;
use skimmer_integration::tar::{Header, Tar};
use skimmer_integration::tree::{self, Tree};

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

/// One of each, with owners and modes.
fn kinds() -> Tar {
    let owned = |name: &str, mode: u32, uid: u64, gid: u64| Header {
        mode,
        uid,
        gid,
        ..Header::new(name, b'0')
    };
    Tar::new()
        .dir("d/")
        .file("d/file", b"hello")
        .symlink("d/link", "file")
        .symlink("d/dangling", "../no/where")
        .hard_link("d/hard", "d/file")
        .hard_link("harder", "d/file")
        .device("d/null", b'3', 1, 3)
        .device("d/disk", b'4', 259, 70_000)
        .entry(Header::new("d/pipe", b'6'), b"")
        .file("d/empty", b"")
        .entry(owned("suid", 0o4755, 0, 0), b"s")
        .entry(owned("sgid", 0o2755, 0, 5), b"s")
        .entry(owned("theirs", 0o600, 1000, 2000), b"t")
        .entry(owned("nobody", 0, 65534, 65534), b"n")
        .entry(Header { mode: 0o1777, ..Header::new("tmp/", b'5') }, b"")
        .entry(Header { mode: 0o2775, gid: 50, ..Header::new("shared/", b'5') }, b"")
}

/// Files whose ends fall everywhere around blocks, sectors and chunks.
fn sizes() -> Tar {
    let lengths =
        [1, 2, 511, 512, 513, 4095, 4096, 4097, 65_536, 1 << 20, (1 << 20) + 1, 3_500_001];
    let tar = lengths.iter().enumerate().fold(Tar::new().dir("s/"), |tar, (number, length)| {
        tar.file(format!("s/{length}"), &noise(number as u64 + 1, *length))
    });
    // Compressible: many output bytes for few input bytes.
    tar.file("s/text", "all work and no play\n".repeat(300_000).as_bytes())
}

fn long_names() -> Tar {
    let (pax, gnu) = (format!("p/{}", "x".repeat(200)), format!("n/{}", "y".repeat(200)));
    let deep = format!("p/{}", "sub/".repeat(60));
    let target = "t".repeat(3000);
    let mut prefixed = Header::new("file", b'0');
    prefixed.patches.push((345, b"u/v".to_vec()));
    let mut tar = Tar::new().dir("p/").dir("n/").dir("u/").dir("u/v/");
    for depth in 1..=60 {
        tar = tar.pax(&[("path", format!("p/{}", "sub/".repeat(depth)).as_bytes())]).dir("short/");
    }
    tar.pax(&[("path", pax.as_bytes())])
        .file("short", b"pax")
        .pax(&[("path", format!("{deep}leaf").as_bytes())])
        .file("short", b"deep")
        .pax(&[("linkpath", target.as_bytes())])
        .symlink("p/l", "short")
        .gnu_long(b'L', gnu.as_bytes())
        .file("short", b"gnu")
        .gnu_long(b'K', gnu.as_bytes())
        .hard_link("n/h", "short")
        .gnu_long(b'L', format!("n/{}", "z".repeat(255)).as_bytes())
        .gnu_long(b'K', target.as_bytes())
        .symlink("short", "short")
        .entry(prefixed, b"ustar prefix")
}

/// Pax records win over the header's own fields.
fn overrides() -> Tar {
    let data = noise(3, 1500);
    let mut small = Header::new("wrong", b'0');
    small.size = 1500;
    small.patches.push((124, b"00000000005\0".to_vec()));
    Tar::new()
        .pax(&[
            ("path", b"right"),
            ("size", b"1500"),
            ("uid", b"70000"),
            ("gid", b"3000000"),
            ("mtime", b"1500000000.25"),
            ("uname", b"someone"),
        ])
        .entry(small, &data)
        .pax(&[
            ("linkpath", b"right"),
            ("uid", b"70000"),
            ("gid", b"3000000"),
            ("mtime", b"1500000000.25"),
        ])
        .hard_link("again", "wrong")
        .file("after", b"the next header is where it should be")
}

fn base_256() -> Tar {
    let mut sized = Header::new("sized", b'0');
    sized.size = 600;
    let mut field = vec![0x80];
    field.extend_from_slice(&[0; 9]);
    field.extend_from_slice(&600_u16.to_be_bytes());
    sized.patches.push((124, field));
    Tar::new()
        .entry(sized, &noise(5, 600))
        .entry(
            Header { uid: 4_000_000_000, gid: 2_097_152, gnu: true, ..Header::new("owners", b'0') },
            b"o",
        )
        .entry(Header { mtime: 1 << 32, gnu: true, ..Header::new("after-2106", b'0') }, b"a")
}

/// A sparse file: its name, its length, and its data at offsets.
type Sparse<'a> = (&'a str, usize, &'a [(u64, &'a [u8])]);

/// GNU's own sparse files, which umoci doesn't know.
fn sparse_gnu() -> Corner {
    let piece = noise(9, 700);
    let many: Vec<(u64, &[u8])> = (0..60).map(|n| (n * 10_000 + 3, &piece[..])).collect();
    let files: [Sparse<'_>; 4] = [
        ("few", 100_000, &[(0, b"start"), (50_000, b"middle"), (99_997, b"end")]),
        ("many", 600_000, &many),
        ("only-hole", 1 << 20, &[(1 << 20, b"")]),
        ("aligned", 8192, &[(4096, &piece[..512])]),
    ];
    let (mut sparse, mut plain) = (Tar::new(), Tar::new());
    for (name, size, extents) in files {
        let mut whole = vec![0; size];
        for (at, bytes) in extents {
            let at = usize::try_from(*at).unwrap_or(usize::MAX);
            whole[at..at + bytes.len()].copy_from_slice(bytes);
        }
        sparse = sparse.gnu_sparse(name, size as u64, extents);
        plain = plain.file(name, &whole);
    }
    Corner {
        plain: Some(plain.file("after", b"x").end()),
        umoci_only: true,
        ..Corner::new("sparse-gnu", sparse.file("after", b"x"))
    }
}

/// GNU tar's three ways to write sparse files with pax records.
fn sparse_pax() -> Tar {
    let piece = noise(11, 512);
    let tar = Tar::new()
        .pax(&[
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.offset", b"512"),
            ("GNU.sparse.numbytes", b"512"),
            ("GNU.sparse.offset", b"20000"),
            ("GNU.sparse.numbytes", b"0"),
        ])
        .file("zero-zero", &piece);
    let tar = tar
        .pax(&[
            ("GNU.sparse.name", b"zero-one"),
            ("GNU.sparse.size", b"20000"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.map", b"100,512,20000,0"),
        ])
        .file("GNUSparseFile.0/zero-one", &piece);
    let mut map = b"2\n1000\n512\n20000\n0\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(&piece);
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"one-zero"),
        ("GNU.sparse.realsize", b"20000"),
    ])
    .file("GNUSparseFile.0/one-zero", &map)
    .file("after", b"x")
}

fn times() -> Tar {
    Tar::new()
        .pax(&[("mtime", b"1600000000.123456789")])
        .file("nanoseconds", b"x")
        .pax(&[("mtime", b"1600000000.000000001"), ("atime", b"5"), ("ctime", b"6")])
        .dir("d/")
        .pax(&[("mtime", b"1234567890.5")])
        .symlink("link", "nanoseconds")
        .entry(Header { mtime: 0, ..Header::new("epoch", b'0') }, b"")
}

fn attributes() -> Tar {
    // struct vfs_cap_data, revision 2: CAP_NET_RAW permitted and effective (linux/capability.h).
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    // posix_acl_xattr: version 2, then tag, permissions, id (linux/posix_acl_xattr.h).
    let entry = |tag: u16, rights: u16, id: u32| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let nobody = u32::MAX;
    let list = [
        2_u32.to_le_bytes().to_vec(),
        entry(1, 6, nobody),
        entry(2, 4, 1000),
        entry(4, 4, nobody),
        entry(16, 4, nobody),
        entry(32, 4, nobody),
    ]
    .concat();
    let long = noise(13, 2000);
    Tar::new()
        .pax(&[("SCHILY.xattr.security.capability", capability)])
        .program("ping", b"x")
        .pax(&[("SCHILY.xattr.system.posix_acl_access", &list)])
        .file("listed", b"x")
        .pax(&[("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.user.long", &long)])
        .file("several", b"x")
        .pax(&[("SCHILY.xattr.user.d", b"on a directory")])
        .dir("d/")
        .pax(&[("SCHILY.xattr.user.a", b"1")])
        .file("d/same-as-several", b"x")
        .file("d/none", b"x")
}

fn odd_paths() -> Tar {
    Tar::new()
        .dir("./")
        .file("./dot", b"1")
        .file("/abs/olute", b"2")
        .file("../../up/above", b"3")
        .file("a/../b", b"4")
        .file("a//c/./d", b"5")
        .hard_link("./e", "./dot")
        .hard_link("f", "/abs/olute")
}

/// Types of the seventh edition and of POSIX that umoci doesn't know.
fn old_types() -> Corner {
    let directory = Header { mode: 0o755, ..Header::new("v7-dir/", 0) };
    let tar = Tar::new()
        .entry(directory, b"")
        .entry(Header::new("v7-dir/file", 0), b"seventh edition")
        .entry(Header::new("contiguous", b'7'), b"as good as any file");
    let plain = Tar::new().dir("v7-dir/").file("v7-dir/file", b"seventh edition");
    Corner {
        plain: Some(plain.file("contiguous", b"as good as any file").end()),
        umoci_only: true,
        ..Corner::new("old-types", tar)
    }
}

/// containerd leaves the root as it is.
fn root() -> Tar {
    let root = Header { mode: 0o700, uid: 7, gid: 8, ..Header::new("./", b'5') };
    Tar::new().entry(root, b"").file("./f", b"x")
}

/// containerd moves such times to 1970.
fn before_1970() -> Tar {
    Tar::new()
        .pax(&[("mtime", b"-1.5")])
        .file("pax", b"x")
        .entry(Header { mtime: -86_400, gnu: true, ..Header::new("gnu", b'0') }, b"b")
}

/// containerd drops attributes of this name space.
fn trusted() -> Tar {
    Tar::new().pax(&[("SCHILY.xattr.trusted.t", b"\0\xff")]).dir("d/").file("d/f", b"x")
}

/// A hard link's header says other things than its target's. containerd believes the link's.
fn link_header() -> Tar {
    Tar::new()
        .entry(Header { uid: 5, mode: 0o600, ..Header::new("target", b'0') }, b"x")
        .hard_link("link", "target")
}

fn many_entries() -> Tar {
    (0..3000).fold(Tar::new().dir("m/"), |tar, number: usize| {
        tar.file(format!("m/{number}-{}", "n".repeat(number % 90)), number.to_string().as_bytes())
    })
}

/// Entries that meet others of the same name.
fn replacements() -> Vec<Corner> {
    let later = Tar::new().hard_link("b", "a").hard_link("c", "b").file("a", b"later").dir("d/");
    let later = Corner {
        plain: Some(
            Tar::new().file("a", b"later").hard_link("b", "a").hard_link("c", "a").dir("d/").end(),
        ),
        umoci_only: true,
        ..Corner::new("link-to-later", later)
    };
    vec![
        later,
        Corner::new(
            "last-wins",
            Tar::new().file("a", b"first").hard_link("b", "a").file("a", b"second, longer"),
        ),
        Corner::new(
            "dir-to-file",
            Tar::new().dir("a/").file("a/in", b"x").file("a", b"now a file"),
        ),
        Corner::new(
            "file-to-dir",
            Tar::new().file("a", b"x").dir("a/").file("a/in", b"now inside"),
        ),
        Corner::new(
            "link-to-dir",
            Tar::new().dir("t/").symlink("a", "t").dir("a/").file("a/in", b"own"),
        ),
        Corner::new(
            "dir-twice",
            Tar::new()
                .dir("a/")
                .file("a/in", b"stays")
                .entry(Header { mode: 0o700, ..Header::new("a/", b'5') }, b""),
        ),
    ]
}

fn whiteouts() -> Vec<Vec<u8>> {
    let base = Tar::new()
        .dir("keep/")
        .file("keep/gone", b"1")
        .file("keep/stays", b"2")
        .file("keep/new", b"old");
    let base = base
        .dir("opaque/")
        .file("opaque/hidden", b"3")
        .dir("opaque/sub/")
        .file("opaque/sub/x", b"4");
    let base =
        base.dir("whole/").file("whole/x", b"5").file("file", b"6").dir("dir/").file("dir/x", b"7");
    let upper = Tar::new().dir("keep/").file("keep/.wh.gone", b"").file("keep/new", b"new");
    let upper = upper
        .dir("opaque/")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/seen", b"8")
        .file(".wh.whole", b"");
    // A file where a directory was below, and the reverse.
    let upper = upper.file("dir", b"a file").dir("file/").file("file/in", b"9");
    vec![base.end(), upper.end()]
}
