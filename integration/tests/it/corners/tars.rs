//! Layers of every odd kind, as tar streams.

use skimmer_integration::layer::noise;
use skimmer_integration::tar::{Header, Tar};

use super::Corner;

/// One of each, with owners and modes.
pub fn kinds() -> Tar {
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
pub fn sizes() -> Tar {
    let lengths =
        [1, 2, 511, 512, 513, 4095, 4096, 4097, 65_536, 1 << 20, (1 << 20) + 1, 3_500_001];
    let tar = lengths.iter().enumerate().fold(Tar::new().dir("s/"), |tar, (number, length)| {
        tar.file(format!("s/{length}"), &noise(number as u64 + 1, *length))
    });
    // Compressible: many output bytes for few input bytes.
    tar.file("s/text", "all work and no play\n".repeat(300_000).as_bytes())
}

pub fn long_names() -> Tar {
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
pub fn overrides() -> Tar {
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

pub fn base_256() -> Tar {
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
pub fn sparse_gnu() -> Corner {
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
pub fn sparse_pax() -> Tar {
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

pub fn times() -> Tar {
    Tar::new()
        .pax(&[("mtime", b"1600000000.123456789")])
        .file("nanoseconds", b"x")
        .pax(&[("mtime", b"1600000000.000000001"), ("atime", b"5"), ("ctime", b"6")])
        .dir("d/")
        .pax(&[("mtime", b"1234567890.5")])
        .symlink("link", "nanoseconds")
        .entry(Header { mtime: 0, ..Header::new("epoch", b'0') }, b"")
}

pub fn attributes() -> Tar {
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

pub fn odd_paths() -> Tar {
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
pub fn old_types() -> Corner {
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
pub fn root() -> Tar {
    let root = Header { mode: 0o700, uid: 7, gid: 8, ..Header::new("./", b'5') };
    Tar::new().entry(root, b"").file("./f", b"x")
}

/// containerd moves such times to 1970.
pub fn before_1970() -> Tar {
    Tar::new()
        .pax(&[("mtime", b"-1.5")])
        .file("pax", b"x")
        .entry(Header { mtime: -86_400, gnu: true, ..Header::new("gnu", b'0') }, b"b")
}

/// containerd drops attributes of this name space.
pub fn trusted() -> Tar {
    Tar::new().pax(&[("SCHILY.xattr.trusted.t", b"\0\xff")]).dir("d/").file("d/f", b"x")
}

/// A hard link's header says other things than its target's. containerd believes the link's.
pub fn link_header() -> Tar {
    Tar::new()
        .entry(Header { uid: 5, mode: 0o600, ..Header::new("target", b'0') }, b"x")
        .hard_link("link", "target")
}

pub fn many_entries() -> Tar {
    (0..3000).fold(Tar::new().dir("m/"), |tar, number: usize| {
        tar.file(format!("m/{number}-{}", "n".repeat(number % 90)), number.to_string().as_bytes())
    })
}

/// Entries that meet others of the same name.
pub fn replacements() -> Vec<Corner> {
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

pub fn whiteouts() -> Vec<Vec<u8>> {
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
