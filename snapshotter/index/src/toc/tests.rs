//! Blobs with TOCs, made here as their tools make them.

#![expect(clippy::cast_possible_truncation, reason = "test blobs are small")]

use std::io::Write;

use proptest::prelude::{any, prop_assert, proptest};
use serde_json::{Value, json};
use skimmer_proto::Digest;

use super::{Error, FOOTER_LEN, Format, Found, Place, Toc, find, read};
use crate::build::DataScan;
use crate::build::tests::{data_file, read as read_file};
use crate::codec::tests::{data, decode};
use crate::index::{LayerIndex, Layout};
use crate::tar::Limits;

const CHUNK: usize = 100_000;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    [&[0x50, 0x2a, 0x4d, 0x18], &(bytes.len() as u32).to_le_bytes()[..], bytes].concat()
}

fn tar_header(name: &str, size: usize) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(name).unwrap();
    header.set_size(size as u64);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(0);
    header.set_mtime(1_566_297_043);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// A blob of these files and its TOC's entries: headers and each chunk in their own member or frame.
fn blob_of(files: &[(&str, Vec<u8>)], compress: fn(&[u8]) -> Vec<u8>) -> (Vec<u8>, Vec<Value>) {
    let (mut blob, mut between, mut entries) = (Vec::new(), Vec::new(), Vec::new());
    for (name, content) in files {
        between.extend(tar_header(name, content.len()));
        let mut entry = json!({"name": name, "type": "reg", "mode": 0o100_644, "uid": 7, "gid": 0,
            "modtime": "2019-08-20T10:30:43Z"});
        if content.is_empty() {
            entries.push(entry);
            continue;
        }
        blob.extend(compress(&between));
        between.clear();
        entry["size"] = content.len().into();
        entry["digest"] = Digest::of(content).to_string().into();
        let last = content.chunks(CHUNK).count() - 1;
        for (i, chunk) in content.chunks(CHUNK).enumerate() {
            if i > 0 {
                entries.push(entry);
                entry = json!({"name": name, "type": "chunk", "chunkOffset": i * CHUNK});
            }
            entry["offset"] = blob.len().into();
            entry["chunkSize"] = if i < last { chunk.len() } else { 0 }.into();
            if last > 0 {
                entry["chunkDigest"] = Digest::of(chunk).to_string().into();
            }
            blob.extend(compress(chunk));
        }
        entries.push(entry);
        between.resize(content.len().next_multiple_of(512) - content.len(), 0);
    }
    if !between.is_empty() {
        blob.extend(compress(&between));
    }
    (blob, entries)
}

fn estargz(files: &[(&str, Vec<u8>)], extra: &[Value], legacy: bool) -> Vec<u8> {
    let (mut blob, mut entries) = blob_of(files, gzip);
    entries.extend_from_slice(extra);
    finish_estargz(&mut blob, &entries, legacy);
    blob
}

fn finish_estargz(blob: &mut Vec<u8>, entries: &[Value], legacy: bool) {
    let toc = json!({"version": 1, "entries": entries}).to_string();
    let at = blob.len();
    let mut tar = tar_header("stargz.index.json", toc.len());
    tar.extend(toc.as_bytes());
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    blob.extend(gzip(&tar));
    blob.extend(*b"\x1f\x8b\x08\x04\0\0\0\0\0\xff");
    blob.extend(if legacy { &b"\x16\0"[..] } else { b"\x1a\0SG\x16\0" });
    blob.extend(format!("{at:016x}STARGZ").into_bytes());
    blob.extend(*b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
}

fn zstd_chunked(files: &[(&str, Vec<u8>)], extra: &[Value], legacy: bool) -> Vec<u8> {
    let (mut blob, mut entries) = blob_of(files, zstd_frame);
    entries.extend_from_slice(extra);
    finish_zstd_chunked(&mut blob, &entries, legacy);
    blob
}

fn finish_zstd_chunked(blob: &mut Vec<u8>, entries: &[Value], legacy: bool) {
    let toc = json!({"version": 1, "entries": entries, "tarSplitDigest": "x"}).to_string();
    let packed = zstd_frame(toc.as_bytes());
    let at = blob.len() + 8;
    blob.extend(skippable(&packed));
    let mut numbers = vec![at, packed.len(), toc.len(), 1];
    if !legacy {
        blob.extend(skippable(b"tar-split"));
        numbers.extend([at + packed.len() + 8, 9, 9]);
    }
    let mut footer: Vec<u8> = numbers.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
    footer.extend(*b"GnUlInUx");
    blob.extend(skippable(&footer));
}

type Make = fn(&[(&str, Vec<u8>)], &[Value], bool) -> Vec<u8>;
const MAKERS: [(Format, Make); 2] =
    [(Format::Estargz, estargz), (Format::ZstdChunked, zstd_chunked)];

fn tail(blob: &[u8]) -> &[u8] {
    &blob[blob.len().saturating_sub(FOOTER_LEN as usize)..]
}

fn found_in(blob: &[u8]) -> Result<Found, Error> {
    let place = find(tail(blob), blob.len() as u64).unwrap();
    read(&place, &blob[place.blob.start as usize..place.blob.end as usize])
}

fn toc_of(blob: &[u8]) -> Result<Toc, Error> {
    Toc::new(found_in(blob)?, blob.len() as u64, Limits::default())
}

fn index_of(blob: &[u8]) -> Result<LayerIndex, Error> {
    toc_of(blob)?.into_index().map(|(index, _)| index)
}

/// A TOC of these bytes, wherever they are from.
fn found(place: Place, json: &[u8]) -> Found {
    Found { place, json: json.to_vec(), packed: Digest::of(b""), file: None }
}

fn index(place: &Place, json: &[u8], len: u64, limits: Limits) -> Result<LayerIndex, Error> {
    Toc::new(found(place.clone(), json), len, limits)?.into_index().map(|(index, _)| index)
}

#[test]
fn a_toc_serves_every_file() {
    let files = [
        ("small", data(1, 10)),
        ("empty", vec![]),
        ("d/chunked", data(2, 3 * CHUNK + 77)),
        ("d/exact", data(3, CHUNK)),
        ("last", data(4, 5000)),
    ];
    for (format, make) in MAKERS {
        for legacy in [false, true] {
            let blob = make(&files, &[], legacy);
            assert_eq!(find(tail(&blob), blob.len() as u64).unwrap().format, format);
            let (index, digests) = toc_of(&blob).unwrap().into_index().unwrap();
            // An eStargz TOC is a file, too.
            let own = usize::from(format == Format::Estargz);
            assert_eq!((index.layout, index.chunks.len()), (Layout::Toc, 7 + own));
            assert_eq!(LayerIndex::decode(&index.encode().unwrap()).unwrap(), index);
            let file = data_file(&index, &blob);
            for (name, content) in &files {
                let path: Vec<&[u8]> = name.split('/').map(str::as_bytes).collect();
                assert!(read_file(&index, &file, &path) == *content, "{format:?} {name}");
            }
            for (chunk, digest) in index.chunks.iter().zip(&digests) {
                let bytes = &file[chunk.data.start as usize..chunk.data.end as usize];
                assert_eq!(Digest::of(bytes), *digest);
            }
            if own > 0 {
                let json = read_file(&index, &file, &[b"stargz.index.json"]);
                assert_eq!(Digest::of(&json), found_in(&blob).unwrap().digest());
            }
            // To a reader that doesn't look for TOCs it is a tar like any other.
            let (tar, decoded) = decode(&blob, 10_000);
            assert!(decoded.is_ok() && tar.starts_with(&tar_header("small", 10)));
        }
    }
}

#[test]
fn holes_and_other_kinds() {
    let extra = [
        json!({"name": "h", "type": "reg", "size": 3000, "chunkSize": 1000, "chunkType": "zeros"}),
        json!({"name": "h", "type": "chunk", "chunkOffset": 1000, "chunkSize": 2000, "chunkType": "zeros"}),
        json!({"name": "l", "type": "symlink", "linkName": "../x", "xattrs": null}),
        json!({"name": "hard", "type": "hardlink", "linkName": "small"}),
        json!({"name": "dev", "type": "char", "devMajor": 5, "devMinor": 1}),
        json!({"name": "dir/", "type": "dir", "mode": 16877, "xattrs": {"user.a": "aGk="}}),
        json!({"name": "dir/.wh.gone", "type": "reg"}),
    ];
    let blob = zstd_chunked(&[("small", b"content".to_vec())], &extra, false);
    let index = index_of(&blob).unwrap();
    let file = data_file(&index, &blob);
    assert_eq!(read_file(&index, &file, &[b"h"]), [0; 3000]);
    assert_eq!(read_file(&index, &file, &[b"hard"]), b"content");
    let inodes = crate::erofs::Inodes::open(&index.inodes[..], index.data_len).unwrap();
    let find = |name: &[u8]| inodes.lookup(inodes.root(), name).unwrap();
    assert_eq!(inodes.symlink(find(b"l")), Some(&b"../x"[..]));
    assert_eq!(inodes.xattr(find(b"dir"), b"user.a"), Some(&b"hi"[..]));
    assert!(inodes.lookup(find(b"dir"), b"gone").is_some());
}

fn compare(blob: &[u8]) -> Result<(), Error> {
    let (tar, decoded) = decode(blob, 10_000);
    decoded.unwrap();
    let mut scan = DataScan::new(Limits::default());
    scan.push(&tar).unwrap();
    let tree = scan.finish().unwrap().tree;
    toc_of(blob)?.compare(&tree, &mut |buffer, at| {
        buffer.copy_from_slice(&tar[at as usize..at as usize + buffer.len()]);
        Ok(())
    })
}

#[test]
fn a_toc_is_what_its_tar_says_or_a_lie() {
    let files = [
        ("a", data(1, 700_000)),
        ("empty", vec![]),
        ("f", vec![]),
        ("d/b", [vec![0; CHUNK], data(2, 5000)].concat()),
    ];
    type Lie = fn(&mut Vec<Value>);
    let lies: [(&str, &str, Lie); 13] = [
        ("", "", |_| {}),
        // A chunk of zeros may be told as a hole.
        ("", "", |e| {
            let entry = e.iter_mut().find(|entry| entry["name"] == "d/b").unwrap();
            entry["chunkType"] = "zeros".into();
        }),
        ("a", "content", |e| e[1]["chunkDigest"] = Digest::of(b"").to_string().into()),
        ("a", "content", |e| e[1]["chunkType"] = "zeros".into()),
        ("a", "mode", |e| e[0]["mode"] = 0o4755.into()),
        ("a", "owner", |e| e[0]["uid"] = 0.into()),
        ("a", "time", |e| e[0]["modtime"] = "2019-08-20T10:30:44Z".into()),
        ("a", "set of extended attributes", |e| e[0]["xattrs"] = json!({"user.a": "aGk="})),
        ("empty", "type, size, target or device", |e| {
            let entry = e.iter_mut().find(|entry| entry["name"] == "empty").unwrap();
            *entry = json!({"name": "empty", "type": "symlink", "linkName": "a"});
        }),
        ("/", "set of entries", |e| e.push(json!({"name": "more", "type": "dir"}))),
        ("/", "set of entries", |e| e.retain(|entry| entry["name"] != "empty")),
        ("d", "mode", |e| e.push(json!({"name": "d", "type": "dir", "mode": 0o700}))),
        ("f", "number of links", |e| {
            e.push(json!({"name": "f", "type": "hardlink", "linkName": "empty"}));
        }),
    ];
    type Finish = fn(&mut Vec<u8>, &[Value], bool);
    let makers: [(fn(&[u8]) -> Vec<u8>, Finish); 2] =
        [(gzip, finish_estargz), (zstd_frame, finish_zstd_chunked)];
    for (compress, finish) in makers {
        for (number, (expected_path, expected, lie)) in lies.iter().enumerate() {
            let (mut blob, mut entries) = blob_of(&files, compress);
            lie(&mut entries);
            finish(&mut blob, &entries, false);
            match compare(&blob) {
                Ok(()) => assert_eq!(*expected, "", "lie {number}"),
                Err(Error::Lie { path, what }) => {
                    assert_eq!((path.as_str(), what), (*expected_path, *expected), "{number}");
                }
                Err(error) => panic!("{number}: {error}"),
            }
        }
    }
}

#[test]
fn a_manifest_means_one_toc() {
    for (format, make) in MAKERS {
        let blob = make(&[("a", data(1, 100))], &[], false);
        let place = find(tail(&blob), blob.len() as u64).unwrap();
        let packed = &blob[place.blob.start as usize..place.blob.end as usize];
        let found = found_in(&blob).unwrap();
        let annotated = match format {
            Format::Estargz => found.digest(),
            Format::ZstdChunked => Digest::of(packed),
        };
        assert!(found.is(annotated) && !found.is(Digest::of(&blob)), "{format:?}");
    }
}

#[test]
fn what_is_refused() {
    for (name, extra) in [
        ("unknown type", json!({"name": "x", "type": "socket"})),
        ("chunk of nothing", json!({"name": "x", "type": "chunk", "offset": 1})),
        ("behind the TOC", json!({"name": "x", "type": "reg", "size": 5, "offset": 1u64 << 40})),
        ("before others", json!({"name": "x", "type": "reg", "size": 5, "offset": 1})),
        (
            "chunks missing",
            json!({"name": "x", "type": "reg", "size": 5, "offset": 1, "chunkSize": 4}),
        ),
        ("chunk too long", json!({"name": "x", "type": "reg", "size": 5, "chunkSize": 6})),
        ("no digest", json!({"name": "x", "type": "reg", "size": 5, "digest": "sha256:1"})),
        ("inside a member", json!({"name": "x", "type": "reg", "size": 5, "innerOffset": 6})),
        ("huge", json!({"name": "x", "type": "reg", "size": u64::MAX, "offset": 1})),
        ("negative", json!({"name": "x", "type": "reg", "size": -1})),
        ("bad time", json!({"name": "x", "type": "dir", "modtime": "yesterday"})),
        ("bad attribute", json!({"name": "x", "type": "dir", "xattrs": {"user.a": "?"}})),
        ("too long", json!({"name": "x".repeat(5000), "type": "dir"})),
        ("not an entry", json!(7)),
    ] {
        for (format, make) in MAKERS {
            let blob = make(&[("a", data(1, 5000))], std::slice::from_ref(&extra), false);
            assert!(index_of(&blob).is_err(), "{name}, {format:?}");
        }
    }
    let place = Place { format: Format::Estargz, blob: 0..10 };
    for json in [r#"{"version":2,"entries":[]}"#, r#"{"entries":[]}"#, "{}", "[]", "", "{} x"] {
        assert!(index(&place, json.as_bytes(), 100, Limits::default()).is_err(), "{json}");
    }
    let few = Limits { entries: 1, ..Limits::default() };
    let two = r#"{"version":1,"entries":[{"name":"a","type":"dir"},{"name":"b","type":"dir"}]}"#;
    let refused = index(&place, two.as_bytes(), 100, few);
    assert!(matches!(refused, Err(Error::TooManyEntries { limit: 1 })), "{refused:?}");
}

#[test]
fn footers_that_point_nowhere() {
    for (_, make) in MAKERS {
        let blob = make(&[("a", data(1, 100))], &[], false);
        let tail = tail(&blob);
        assert!(find(tail, blob.len() as u64).is_some());
        assert_eq!(find(tail, 60), None);
        assert_eq!(find(&tail[1..tail.len() - 1], blob.len() as u64), None);
        assert_eq!(find(&[], 0), None);
    }
}

#[test]
fn the_footer_that_skopeo_writes() {
    // skopeo 1.9.3: a TOC of 3337 bytes, 11511 decompressed, at 3001404.
    let footer = b"\x50\x2a\x4d\x18\x28\0\0\0\x3c\xcc\x2d\0\0\0\0\0\x09\x0d\0\0\0\0\0\0\
        \xf7\x2c\0\0\0\0\0\0\x01\0\0\0\0\0\0\0GnUlInUx";
    let expected = Place { format: Format::ZstdChunked, blob: 3_001_404..3_004_741 };
    assert_eq!(find(footer, 3_004_789), Some(expected));
}

proptest! {
    #[test]
    fn damage_never_panics(zstd: bool, flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6), in_json: bool) {
        let (_, make) = MAKERS[usize::from(zstd)];
        let mut blob = make(&[("a", data(1, 3000)), ("b", data(2, 150_000))], &[], false);
        let place = find(tail(&blob), blob.len() as u64).unwrap();
        let range = place.blob.start as usize..place.blob.end as usize;
        let mut json = read(&place, &blob[range.clone()]).unwrap().json;
        for (at, byte) in flips {
            let bytes = if in_json { &mut json[..] } else { &mut blob[range.start..] };
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(place) = find(tail(&blob), blob.len() as u64) {
            let range = place.blob.start as usize..place.blob.end as usize;
            let _ = read(&place, &blob[range]);
        }
        if let Ok(index) = index(&place, &json, blob.len() as u64, Limits::default()) {
            let encoded = index.encode().unwrap();
            prop_assert!(LayerIndex::decode(&encoded).unwrap() == index);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), blob_len: u64, zstd: bool) {
        let _ = find(&bytes, blob_len);
        let format = if zstd { Format::ZstdChunked } else { Format::Estargz };
        let place = Place { format, blob: 0..bytes.len() as u64 };
        let _ = read(&place, &bytes);
        let _ = super::estargz::json(&bytes);
        let _ = index(&place, &bytes, blob_len, Limits::default());
    }
}
