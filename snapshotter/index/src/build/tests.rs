//! Whole blobs: what the index says is what the tar holds.

#![expect(clippy::cast_possible_truncation, reason = "test blobs are small")]

use std::io::Write;

use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest};
use skimmer_proto::Digest;

use super::{BlobSums, Built, DataScan, Decoder, Error, assemble};
use crate::chunk::decode_chunk;
use crate::erofs::Inodes;
use crate::index::LayerIndex;
use crate::tar::Limits;

/// A tar of files with these contents, `f0`, `f1` and so on.
fn tar_of(files: &[Vec<u8>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (i, content) in files.iter().enumerate() {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_000_000_000);
        builder.append_data(&mut header, format!("d/f{i}"), &content[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// One GNU sparse file (old format), whose two extents aren't aligned in it: they must be copied.
fn sparse_tar(data: &[u8]) -> Vec<u8> {
    let octal = |n: usize, digits: usize| format!("{n:0digits$o}\0").into_bytes();
    let mut header = [0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"sparse");
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, &octal(data.len(), 11));
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, b"S");
    put(257, b"ustar  \0");
    let half = data.len() / 2;
    put(386, &octal(100, 11));
    put(398, &octal(half, 11));
    put(410, &octal(70_000, 11));
    put(422, &octal(data.len() - half, 11));
    put(483, &octal(80_000, 11));
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = [&header[..], data].concat();
    out.resize(out.len().next_multiple_of(512) + 1024, 0);
    out
}

fn build(blob: &[u8], step: usize) -> Result<Built, Error> {
    let mut sums = BlobSums::new(blob.len() as u64)?;
    let (mut decoder, mut scan) = (Decoder::new(1 << 30), DataScan::new(Limits::default()));
    let mut scanned = Ok(());
    let mut out = |bytes: &[u8]| {
        if scanned.is_ok() {
            scanned = scan.push(bytes);
        }
    };
    for part in blob.chunks(step.max(1)) {
        sums.push(part)?;
        decoder.push(part, &mut out).unwrap();
    }
    let decoded = decoder.finish(&mut out).unwrap();
    scanned?;
    assemble(sums.finish()?, decoded, scan.finish()?)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The data file, made chunk by chunk as a node does.
pub(crate) fn data_file(index: &LayerIndex, blob: &[u8]) -> Vec<u8> {
    let mut file = vec![0; index.data_len as usize];
    let mut out = Vec::new();
    for i in (0..index.chunks.len()).rev() {
        let range = index.blob_range(i..i + 1);
        let compressed = &blob[range.start as usize..range.end as usize];
        decode_chunk(index, i, compressed, &mut out).unwrap();
        let at = index.chunks[i].data.start as usize;
        file[at..at + out.len()].copy_from_slice(&out);
        for copy in index.copies_from(i) {
            let from = (copy.from as usize) - at;
            let part = &out[from..from + copy.len as usize];
            file[copy.to as usize..copy.to as usize + part.len()].copy_from_slice(part);
        }
    }
    file
}

pub(crate) fn read(index: &LayerIndex, file: &[u8], path: &[&[u8]]) -> Vec<u8> {
    let inodes = Inodes::open(&index.inodes[..], index.data_len).unwrap();
    let nid = path.iter().fold(inodes.root(), |dir, name| inodes.lookup(dir, name).unwrap());
    let size = inodes.inode(nid).unwrap().size;
    let mut content = vec![0; size as usize];
    for extent in inodes.extents(nid, 0..size) {
        if let Some(at) = extent.at {
            let to = extent.logical as usize..(extent.logical + extent.len) as usize;
            content[to].copy_from_slice(&file[at as usize..(at + extent.len) as usize]);
        }
    }
    content
}

#[test]
fn sparse_files_are_copied_aside() {
    let data = crate::codec::tests::data(3, 9000);
    let tar = sparse_tar(&data);
    for blob in [tar.clone(), gzip(&tar), zstd::encode_all(&tar[..], 3).unwrap()] {
        let built = build(&blob, 1000).unwrap();
        assert!(!built.index.copies.is_empty());
        let mut expected = vec![0; 80_000];
        expected[100..4600].copy_from_slice(&data[..4500]);
        expected[70_000..74_500].copy_from_slice(&data[4500..]);
        let file = data_file(&built.index, &blob);
        assert!(read(&built.index, &file, &[b"sparse"]) == expected);
        let overflow = built.index.tar_len..built.index.data_len;
        assert_eq!(built.index.chunks_covering(overflow).len(), 1);
    }
}

#[test]
fn lengths_are_checked() {
    let blob = gzip(&tar_of(&[vec![1; 1000]]));
    let mut sums = BlobSums::new(10).unwrap();
    assert!(matches!(sums.push(&blob), Err(Error::BlobLength { expected: 10, .. })));
    let mut sums = BlobSums::new(blob.len() as u64 + 1).unwrap();
    sums.push(&blob).unwrap();
    assert!(matches!(sums.finish(), Err(Error::BlobLength { .. })));
    assert!(matches!(BlobSums::new(1 << 50), Err(Error::BlobTooLong { .. })));
}

#[test]
fn nothing_at_all_is_an_empty_layer() {
    let built = build(b"", 1).unwrap();
    assert_eq!((built.index.tar_len, built.index.chunks.len()), (0, 0));
    assert_eq!(built.table.blob, Digest::of(b""));
    assert_eq!(LayerIndex::decode(&built.encoded).unwrap(), built.index);
}

/// Every node builds the same bytes of a blob: once there are releases, a changed byte needs a new version.
#[test]
fn the_format_stays_as_it_is() {
    let files = [3, 4, 5].map(|seed| crate::codec::tests::data(seed, 900_000));
    let tar = tar_of(&files);
    // By hand: stored blocks, so that no compressor's version matters.
    let mut blob = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    let parts = tar.chunks(60_000);
    let last = parts.len() - 1;
    for (i, part) in parts.enumerate() {
        let len = part.len() as u16;
        blob.push(u8::from(i == last));
        blob.extend([len.to_le_bytes(), (!len).to_le_bytes()].concat());
        blob.extend(part);
    }
    let mut crc = flate2::Crc::new();
    crc.update(&tar);
    blob.extend([crc.sum().to_le_bytes(), crc.amount().to_le_bytes()].concat());
    let built = build(&blob, 12_345).unwrap();
    assert_eq!(built.index.chunks.len(), 6);
    assert_eq!(Digest::of(&built.encoded).hex(), FORMAT);
}
const FORMAT: &str = "6002f3f135c5b267007a0fb23cda7fc57d455d22e4bf6d4a47834158f27d7b08";

fn contents() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let content = (any::<u64>(), 0..800_000usize);
    proptest::collection::vec(content, 0..6).prop_map(|files| {
        files.into_iter().map(|(seed, len)| crate::codec::tests::data(seed, len)).collect()
    })
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(20))]

    #[test]
    fn an_index_is_the_same_however_it_is_built_and_serves_every_file(files in contents(), kind in 0..3usize, step in 500..600_000usize) {
        let tar = tar_of(&files);
        let blob = match kind {
            0 => tar.clone(),
            1 => gzip(&tar),
            _ => tar.chunks(300_000).flat_map(|part| zstd::encode_all(part, 1).unwrap()).collect(),
        };
        let built = build(&blob, step).unwrap();
        prop_assert_eq!(&build(&blob, usize::MAX).unwrap().encoded, &built.encoded);
        prop_assert_eq!(built.table.blob, Digest::of(&blob));
        prop_assert_eq!(built.table.diff_id, Digest::of(&tar));
        prop_assert_eq!(built.table.index, Digest::of(&built.encoded));
        prop_assert_eq!(*built.table.root(), *blake3::hash(&blob).as_bytes());
        let index = LayerIndex::decode(&built.encoded).unwrap();
        prop_assert_eq!(&index, &built.index);
        let file = data_file(&index, &blob);
        prop_assert!(file[..tar.len()] == tar);
        for (i, content) in files.iter().enumerate() {
            let same = read(&index, &file, &[b"d", format!("f{i}").as_bytes()]) == *content;
            prop_assert!(same, "file {}", i);
        }
    }
}
