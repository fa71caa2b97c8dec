//! Tests of the tar walk, on archives built byte by byte.

use proptest::prelude::*;

use super::{Entry, Error, Extent, Kind, Limits, TarWalk};

/// A header block with a right checksum; `edit` may change any field before that.
fn header(name: &[u8], flag: u8, size: &str, edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, value: &[u8]| block[at..at + value.len()].copy_from_slice(value);
    put(0, name);
    put(100, b"0000644\0");
    put(108, b"0001750\0");
    put(116, b"0000012\0");
    put(124, size.as_bytes());
    put(136, b"14542645555\0");
    put(156, &[flag]);
    put(257, b"ustar\x0000");
    edit(&mut block);
    sum(&mut block, false);
    block
}

fn sum(block: &mut [u8], signed: bool) {
    block[148..156].copy_from_slice(b"        ");
    let total: i64 = match signed {
        true => block.iter().map(|b| i64::from(b.cast_signed())).sum(),
        false => block.iter().map(|b| i64::from(*b)).sum(),
    };
    block[148..156].copy_from_slice(format!("{total:06o}\0 ").as_bytes());
}

fn plain(name: &str, flag: u8, size: u64) -> Vec<u8> {
    header(name.as_bytes(), flag, &format!("{size:011o}\0"), |_| {})
}

/// A header and its payload, padded.
fn member(name: &str, flag: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = plain(name, flag, payload.len() as u64);
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

/// A PAX header for the entry after it.
fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut len = rest;
        while len != rest + len.to_string().len() {
            len = rest + len.to_string().len();
        }
        payload.extend_from_slice(format!("{len} {key}=").as_bytes());
        payload.extend_from_slice(value);
        payload.push(b'\n');
    }
    member("pax", b'x', &payload)
}

fn gnu(block: &mut [u8]) {
    block[257..265].copy_from_slice(b"ustar  \0");
}

fn walk(stream: &[u8], limits: Limits) -> Result<(Vec<Entry>, u64), Error> {
    let mut entries = Vec::new();
    let mut walk = TarWalk::new(limits);
    walk.push(stream, &mut |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok((entries, walk.finish()?))
}

fn entries(stream: &[u8]) -> Vec<Entry> {
    walk(stream, Limits::default()).unwrap().0
}

fn one(stream: &[u8]) -> Entry {
    let mut entries = entries(stream);
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

#[test]
fn entries_say_what_the_headers_say() {
    let file = one(&[member("./dir//file", b'0', &[7; 700]), vec![0; 1024]].concat());
    let want = Entry {
        path: b"dir/file".to_vec(),
        kind: Kind::File,
        mode: 0o644,
        uid: 1000,
        gid: 10,
        mtime: (0o14_542_645_555, 0),
        xattrs: vec![],
        size: 700,
        data: vec![Extent { logical: 0, len: 700, at: 512 }],
    };
    assert_eq!(file, want);
    let link =
        |flag| header(b"l", flag, "00000000000\0", |b| b[157..164].copy_from_slice(b"../a/./"));
    let device = |flag| {
        header(b"d", flag, "", |b| {
            b[329..337].copy_from_slice(b"0000010\0");
            b[337..345].copy_from_slice(b"0000003 ");
        })
    };
    for (stream, want) in [
        (plain("a", b'5', 0), Kind::Dir),
        (plain("a/", 0, 0), Kind::Dir),
        (plain("a", 0, 0), Kind::File),
        (plain("a", b'7', 0), Kind::File),
        (plain("a", b'6', 0), Kind::Fifo),
        (link(b'2'), Kind::Symlink { target: b"../a/./".to_vec() }),
        (link(b'1'), Kind::HardLink { target: b"a".to_vec() }),
        (device(b'3'), Kind::CharDevice { major: 8, minor: 3 }),
        (device(b'4'), Kind::BlockDevice { major: 8, minor: 3 }),
    ] {
        assert_eq!(one(&stream).kind, want);
    }
}

#[test]
fn what_has_no_payload_ignores_its_size() {
    for flag in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let stream = [plain("a", flag, 1024), member("b", b'0', b"x")].concat();
        let names: Vec<_> = entries(&stream).into_iter().map(|e| (e.path, e.size)).collect();
        assert_eq!(names, [(b"a".to_vec(), 0), (b"b".to_vec(), 1)], "{}", flag as char);
    }
}

#[test]
fn unknown_types_and_global_records_are_passed_over() {
    let global = [&pax(&[("path", b"no")])[..512], &[]].concat();
    let mut global = global;
    global[156] = b'g';
    sum(&mut global, false);
    let stream = [global, pax(&[("path", b"no")])[512..].to_vec(), member("V", b'V', &[1; 600])];
    assert_eq!(one(&[stream.concat(), plain("yes", b'0', 0)].concat()).path, b"yes");
}

#[test]
fn numbers_may_be_base_256_and_negative() {
    let number = |size: [u8; 12], time: [u8; 12], uid: [u8; 8]| {
        header(b"a", b'5', "", |b| {
            b[108..116].copy_from_slice(&uid);
            b[124..136].copy_from_slice(&size);
            b[136..148].copy_from_slice(&time);
        })
    };
    let (mut time, mut uid) = ([0xff; 12], [0; 8]);
    time[11] = 0xfe;
    uid[0] = 0x80;
    uid[4..].copy_from_slice(&3_000_000_000_u32.to_be_bytes());
    let entry = one(&number([0; 12], time, uid));
    assert_eq!((entry.mtime, entry.uid), ((-2, 0), 3_000_000_000));
    let entry = one(&number([0; 12], [0; 12], [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]));
    assert_eq!(entry.uid, u32::MAX - 1);
    assert_eq!(one(&number([0; 12], [0; 12], [0xff; 8])).uid, 0);
}

#[test]
fn names_come_from_the_longest_form() {
    let prefix = header(b"name", b'0', "", |b| b[345..351].copy_from_slice(b"prefix"));
    assert_eq!(one(&prefix).path, b"prefix/name");
    let gnu_prefix = header(b"name", b'0', "", |b| {
        b[345..357].copy_from_slice(b"14542645555\0");
        gnu(b);
    });
    assert_eq!(one(&gnu_prefix).path, b"name");
    let mistaken = header(b"name", b'0', "", |b| {
        b[345..351].copy_from_slice(b"prefix");
        gnu(b);
    });
    assert_eq!(one(&mistaken).path, b"prefix/name", "as Go before 1.8 wrote it");
    let long = "n".repeat(600);
    let named =
        |name: &str| [member("L", b'L', &[name.as_bytes(), b"\0"].concat()), plain("x", b'0', 0)];
    assert_eq!(one(&named(&long).concat()).path, long.as_bytes());
    let linked = [member("K", b'K', long.as_bytes()), plain("x", b'2', 0)].concat();
    assert_eq!(one(&linked).kind, Kind::Symlink { target: long.clone().into_bytes() });
    let records = pax(&[("path", b"p\xff"), ("linkpath", b"t")]);
    let both = one(&[records, plain("x", b'2', 0)].concat());
    assert_eq!(
        (both.path, both.kind),
        (b"p\xff".to_vec(), Kind::Symlink { target: b"t".to_vec() })
    );
}

#[test]
fn records_override_fields() {
    let records = pax(&[
        ("size", b"513"),
        ("uid", b"70000"),
        ("gid", b""),
        ("mtime", b"-1.25"),
        ("SCHILY.xattr.user.b", b"\0\xff"),
        ("SCHILY.xattr.user.a", b""),
        ("LIBARCHIVE.xattr.user.a", b"AAA"),
    ]);
    let stream = [records, plain("a", b'0', 0), vec![1; 1024], plain("b", b'0', 0)].concat();
    let entries = entries(&stream);
    assert_eq!(entries.len(), 2);
    let a = &entries[0];
    assert_eq!((a.size, a.uid, a.gid, a.mtime), (513, 70000, 10, (-2, 750_000_000)));
    let xattrs = [(b"user.a".to_vec(), vec![]), (b"user.b".to_vec(), vec![0, 0xff])];
    assert_eq!(a.xattrs, xattrs);
    assert!(entries[1].xattrs.is_empty());
}

#[test]
fn large_files_are_passed_over_without_being_held() {
    let records = pax(&[("size", b"8589934592")]);
    let mut walk = TarWalk::new(Limits::default());
    let mut entries = Vec::new();
    let mut sink = |entry: Entry| {
        entries.push((entry.path, entry.size));
        Ok(())
    };
    walk.push(&[records, plain("big", b'0', 0)].concat(), &mut sink).unwrap();
    let zeros = vec![0; 1 << 24];
    for _ in 0..512 {
        walk.push(&zeros, &mut sink).unwrap();
    }
    walk.push(&plain("after", b'0', 0), &mut sink).unwrap();
    assert_eq!(walk.finish().unwrap(), 512 * 4 + (8 << 30));
    assert_eq!(entries, [(b"big".to_vec(), 8 << 30), (b"after".to_vec(), 0)]);
}

/// A file of 10,000 bytes with runs at 1000 (100 bytes) and 5000 (600 bytes), in every form.
#[test]
fn sparse_files_in_every_form() {
    let stored = vec![1; 700];
    let old = |extended: bool| {
        let mut block = header(b"s", b'S', "00000001274\0", |b| {
            gnu(b);
            b[386..410].copy_from_slice(b"00000001750\x0000000000144\0");
            if !extended {
                b[410..434].copy_from_slice(b"00000011610\x0000000001130\0");
            }
            b[482] = u8::from(extended);
            b[483..495].copy_from_slice(b"00000023420\0");
        });
        if extended {
            let mut more = vec![0; 512];
            more[..24].copy_from_slice(b"00000011610\x0000000001130\0");
            block.extend(more);
        }
        block
    };
    let form = |records: &[(&str, &[u8])], map: &[u8]| {
        let payload = [map, &stored].concat();
        [pax(records), plain("s", b'0', payload.len() as u64)].concat()
    };
    let common: [(&str, &[u8]); 2] = [("GNU.sparse.name", b"s"), ("GNU.sparse.numblocks", b"2")];
    let zero = [
        &common[..],
        &[
            ("GNU.sparse.size", b"10000"),
            ("GNU.sparse.offset", b"1000"),
            ("GNU.sparse.numbytes", b"100"),
            ("GNU.sparse.offset", b"5000"),
            ("GNU.sparse.numbytes", b"600"),
        ],
    ];
    let one =
        [&common[..], &[("GNU.sparse.size", b"10000"), ("GNU.sparse.map", b"1000,100,5000,600")]];
    let mut map = b"2\n1000\n100\n5000\n600\n".to_vec();
    map.resize(512, 0);
    let latest: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"10000"),
    ];
    for (form, mut stream, map_len) in [
        ("old", old(false), 0),
        ("old, extended", old(true), 0),
        ("0.0", form(&zero.concat(), b""), 0),
        ("0.1", form(&one.concat(), b""), 0),
        ("1.0", form(&latest, &map), 512),
    ] {
        let at = stream.len() as u64 + map_len;
        if map_len > 0 {
            stream.extend_from_slice(&map);
        }
        stream.extend_from_slice(&stored);
        stream.resize(stream.len().next_multiple_of(512), 0);
        stream.extend(plain("after", b'0', 0));
        let entries = entries(&stream);
        assert_eq!(entries.len(), 2, "{form}");
        let data = [
            Extent { logical: 1000, len: 100, at },
            Extent { logical: 5000, len: 600, at: at + 100 },
        ];
        assert_eq!((entries[0].size, &entries[0].data[..]), (10_000, &data[..]), "{form}");
        assert_eq!(entries[0].path, b"s", "{form}");
    }
}

#[test]
fn the_end_may_be_marked_or_not() {
    let file = member("a", b'0', &[1; 10]);
    for (tail, what) in [
        (vec![], "nothing"),
        (vec![0; 512], "one block"),
        (vec![0; 1024], "the mark"),
        ([vec![0; 1024], vec![7; 100]].concat(), "the mark and anything"),
    ] {
        let stream = [file.clone(), tail].concat();
        let (entries, len) = walk(&stream, Limits::default()).unwrap();
        assert_eq!((entries.len(), len), (1, stream.len() as u64), "{what}");
    }
    assert_eq!(walk(&file[..522], Limits::default()).unwrap().1, 522, "without padding");
    assert_eq!(walk(b"", Limits::default()).unwrap().1, 0);
}

/// What is wrong with a stream, as people read it.
#[test]
fn bad_streams_are_refused() {
    let edited = |at: usize, value: u8| {
        let mut block = plain("a", b'0', 0);
        block[at] = value;
        block
    };
    let limits =
        Limits { entries: 2, depth: 3, path_bytes: 200, xattr_bytes: 10, ..Limits::default() };
    let two = [plain("a", b'0', 0), plain("b", b'0', 0)].concat();
    let sparse = |map: &[u8]| {
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.size", b"100"),
            ("GNU.sparse.numblocks", b"2"),
            ("GNU.sparse.map", map),
            ("GNU.sparse.major", b"0"),
        ];
        [pax(&[&records[..], &[("GNU.sparse.minor", b"1")]].concat()), plain("a", b'0', 20)]
            .concat()
    };
    for (stream, want) in [
        (edited(0, b'b'), "tar header at byte 0 is invalid: the checksum does not match"),
        (edited(148, b'x'), "the checksum is malformed"),
        (b"<html>".repeat(100), "the checksum is malformed"),
        (
            [vec![0; 512], plain("a", b'0', 0)].concat(),
            "at byte 512 is invalid: it follows a block of zeros",
        ),
        (plain("a", b'0', 0)[..100].to_vec(), "it ends at byte 100 inside a header"),
        (plain("a", b'0', 100), "inside the contents of \"a\", of which 100 bytes are missing"),
        (pax(&[("path", b"x")]), "inside a PAX header, before the entry"),
        (pax(&[("path", b"x")])[..515].to_vec(), "it ends at byte 515 inside an extension header"),
        (member("x", b'x', b"10 a=b\n"), "PAX header at byte 0 is invalid: a record's length"),
        (
            plain("x", b'x', 2 << 20),
            "extension header at byte 0 has 2097152 bytes; at most 1048576",
        ),
        ([pax(&[("mtime", b"soon")]), plain("a", b'0', 0)].concat(), "mtime is not a time"),
        ([pax(&[("size", b"-1")]), plain("a", b'0', 0)].concat(), "size is not a number"),
        (
            [pax(&[("uid", b"9999999999")]), plain("a", b'0', 0)].concat(),
            "the owner's id does not fit",
        ),
        (
            [pax(&[("size", b"9223372036854775807")]), plain("a", b'0', 0)].concat(),
            "\"a\" (tar header at byte 1024) declares 9223372036854775807 bytes, more than the 2199023255552",
        ),
        ([two.clone(), plain("c", b'0', 0)].concat(), "more than 2 entries (at byte 1024)"),
        (plain("a/b/c/d", b'0', 0), "deeper than 3 directories"),
        (
            [member("L", b'L', &[b'n'; 300]), plain("a", b'0', 0)].concat(),
            "path of 300 bytes starting",
        ),
        (
            [pax(&[("SCHILY.xattr.user.long", b"value")]), plain("a", b'0', 0)].concat(),
            "extended attributes of \"a\" (tar header at byte 1024) take 14 bytes; at most 10",
        ),
        (plain("s", b'S', 0), "a sparse entry ('S') needs a GNU header"),
        (sparse(b"0,10,5,10"), "its runs overlap"),
        (sparse(b"0,10,95,10"), "a run lies behind the end of the file"),
        (sparse(b"0,10,20,30"), "do not add up to what is stored"),
        (sparse(b"0,10,20"), "a length is not a number"),
        (sparse(b"0,20"), "the number of runs is not the one announced"),
        (sparse(b"0,18446744073709551615,1,2"), "a length is not a number"),
    ] {
        match walk(&stream, limits.clone()) {
            Ok(_) => panic!("accepted; should be {want:?}"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(want), "{text:?} should have {want:?}");
            }
        }
    }
}

#[test]
fn signed_checksums_count_too() {
    let mut block = header(b"\xff\xfe", b'0', "", |_| {});
    sum(&mut block, true);
    assert_eq!(one(&block).path, b"\xff\xfe");
}

#[test]
fn what_the_sink_refuses_is_named() {
    let mut walk = TarWalk::new(Limits::default());
    let error = walk.push(&plain("a", b'0', 0), &mut |_| Err("no".into())).unwrap_err();
    assert_eq!(error.to_string(), "place \"a\" (tar header at byte 0)");
}

/// A stream with most features, for the property tests.
fn rich() -> Vec<u8> {
    let mut map = b"1\n0\n512\n".to_vec();
    map.resize(512, 0);
    let records: [(&str, &[u8]); 3] =
        [("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9999")];
    [
        member("dir", b'5', b""),
        pax(&[("path", b"long/name"), ("SCHILY.xattr.user.a", b"b")]),
        member("x", b'0', &[3; 1300]),
        member("L", b'L', &[b'n'; 700]),
        member("x", b'0', b"abc"),
        pax(&records),
        member("sparse", b'0', &[&map[..], &[9; 512]].concat()),
        header(b"s", b'S', "00000000000\0", |b| {
            gnu(b);
            b[482] = 1;
            b[483..495].copy_from_slice(b"00000023420\0");
        }),
        vec![0; 512],
        plain("end", b'0', 0),
        vec![0; 1024],
    ]
    .concat()
}

proptest! {
    #[test]
    fn splits_do_not_matter(cuts in prop::collection::vec(1_usize..2000, 1..40)) {
        let stream = rich();
        let whole = entries(&stream);
        prop_assert_eq!(whole.len(), 6);
        let (mut found, mut walk, mut rest) = (Vec::new(), TarWalk::new(Limits::default()), &stream[..]);
        for cut in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            walk.push(now, &mut |entry| { found.push(entry); Ok(()) }).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(walk.finish().unwrap(), stream.len() as u64);
        prop_assert_eq!(found, whole);
    }

    #[test]
    fn damage_never_panics(at in 0_usize..6000, with in prop::collection::vec(any::<u8>(), 0..600), fix in any::<bool>()) {
        let mut stream = rich();
        let at = at.min(stream.len());
        let end = stream.len().min(at + with.len());
        stream[at..end].copy_from_slice(&with[..end - at]);
        if fix {
            let start = (at / 512 * 512).min(stream.len() - 512);
            sum(&mut stream[start..start + 512], false);
        }
        let _ = walk(&stream, Limits::default());
    }

    #[test]
    fn noise_never_panics(stream in prop::collection::vec(any::<u8>(), 0..3000)) {
        let _ = walk(&stream, Limits::default());
    }

    #[test]
    fn noise_in_a_header_never_panics(mut block in prop::collection::vec(any::<u8>(), 512), flag in 0_usize..14) {
        block[156] = b"\x000123456SxgLKV"[flag];
        block[257..265].copy_from_slice(b"ustar  \0");
        sum(&mut block, false);
        let _ = walk(&[block, vec![0; 2048]].concat(), Limits::default());
    }
}
