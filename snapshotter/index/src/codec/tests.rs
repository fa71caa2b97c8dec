//! Against flate2 and zstd as compressors.

#![expect(clippy::cast_possible_truncation, reason = "test blobs are small")]

use std::io::Write;

use flate2::{Compression as Level, GzBuilder};
use proptest::prelude::{Just, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::{Compression, Decoded, Decoder, Error, SPAN};
use crate::chunk::{ChunkDecoder, State, decode_chunk};
use crate::index::{LayerIndex, Layout};

/// Something like a layer: runs that compress, words, noise, zeros.
pub(crate) fn data(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut out = Vec::with_capacity(len + 512);
    while out.len() < len {
        let n = next();
        match n % 8 {
            0 => out.extend(std::iter::repeat_n(0, (n >> 8) as usize % 4096)),
            1 => (0..(n >> 8) % 512).for_each(|_| out.push(next() as u8)),
            2 if out.len() > 40_000 => {
                let (from, count) = ((n >> 8) as usize % 32_000, (n >> 40) as usize % 2000);
                let from = out.len() - from - 2000;
                out.extend_from_within(from..from + count);
            }
            _ => (0..n % 97).for_each(|i| write!(out, "w{} ", (n >> 20) % (i + 1)).unwrap()),
        }
    }
    out.truncate(len);
    out
}

fn gzip(level: u32, bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Level::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd_frame(level: i32, bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, level).unwrap()
}

/// Everything out of the decoder, the blob pushed in pieces of `step` bytes.
pub(crate) fn decode(blob: &[u8], step: usize) -> (Vec<u8>, Result<Decoded, Error>) {
    let mut out = Vec::new();
    let mut decoder = Decoder::new(1 << 30);
    for part in blob.chunks(step.max(1)) {
        if let Err(error) = decoder.push(part, &mut |bytes| out.extend_from_slice(bytes)) {
            return (out, Err(error));
        }
    }
    let done = decoder.finish(&mut |bytes| out.extend_from_slice(bytes));
    (out, done)
}

pub(crate) fn index_of(decoded: Decoded) -> LayerIndex {
    let Decoded { compression, blob_len, data_len, chunks, windows } = decoded;
    LayerIndex {
        compression,
        layout: Layout::Tar,
        blob_len,
        tar_len: data_len,
        data_len: data_len.next_multiple_of(512),
        inodes: b"inodes".to_vec(),
        copies: Vec::new(),
        chunks,
        windows,
    }
}

/// Decodes the blob as a whole and chunk by chunk; returns the index.
fn check(blob: &[u8], expected: &[u8], step: usize) -> LayerIndex {
    let (out, decoded) = decode(blob, step);
    let decoded = decoded.unwrap();
    assert!(out == expected, "{} bytes out, expected {}", out.len(), expected.len());
    let index = index_of(decoded);
    let (mut at, mut decoder, mut room) = (0, ChunkDecoder::default(), vec![0; step.min(1 << 16)]);
    for (i, chunk) in index.chunks.iter().enumerate() {
        assert_eq!(chunk.data.start, at);
        at = chunk.data.end;
        let compressed = &blob[chunk.blob.start as usize..chunk.blob.end as usize];
        let mut out = vec![1, 2, 3];
        decode_chunk(&index, i, compressed, &mut out).unwrap();
        let chunk_data = &expected[chunk.data.start as usize..at as usize];
        assert!(out == chunk_data, "chunk {i}");
        // The same decoder for all, once it was left halfway.
        for end in [compressed.len() / 2, compressed.len()] {
            out.clear();
            decoder.enter(&index, i).unwrap();
            let mut take = |bytes: &[u8]| out.extend_from_slice(bytes);
            decoder.push(&compressed[..end], &mut room, &mut take).unwrap();
        }
        decoder.finish().unwrap();
        assert!(out == chunk_data, "chunk {i}");
    }
    assert_eq!(at, expected.len() as u64);
    let encoded = index.encode().unwrap();
    assert_eq!(LayerIndex::decode(&encoded).unwrap(), index);
    index
}

#[test]
fn sniffing() {
    for (head, expected) in [
        (&b"\x1f\x8b\x08\0"[..], Compression::Gzip),
        (b"\x1f\x8b\x07\0", Compression::Stored),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x50\x2a\x4d\x18", Compression::Zstd),
        (b"\x5f\x2a\x4d\x18", Compression::Zstd),
        (b"\x60\x2a\x4d\x18", Compression::Stored),
        (b"\x1f\x8b", Compression::Stored),
        (b"usr/", Compression::Stored),
        (b"", Compression::Stored),
    ] {
        assert_eq!(Compression::sniff(head), expected, "{head:?}");
    }
}

#[test]
fn one_member_has_a_checkpoint_per_span() {
    let plain = data(1, 7 << 20);
    // Level 1 isn't among them: zlib-ng's and zlib-rs's makes one block of everything.
    for level in [0, 3, 6, 9] {
        let index = check(&gzip(level, &plain), &plain, 100_000);
        assert!((11..=14).contains(&index.chunks.len()), "{} chunks", index.chunks.len());
        for (i, chunk) in index.chunks.iter().enumerate() {
            let at_window = matches!(&chunk.state, State::Gzip { window: Some(_), .. });
            assert_eq!(at_window, i > 0);
            // The longest blocks of these compressors.
            assert!(chunk.data.end - chunk.data.start < SPAN + (256 << 10));
        }
    }
}

#[test]
fn members_and_frames_are_chunks_unless_small() {
    let plain = data(2, 3 << 20);
    for (len, chunks) in [(1 << 19, 6), (300_000, 11), (100_000, 16), (1000, 24)] {
        let by = |compress: fn(&[u8]) -> Vec<u8>| plain.chunks(len).flat_map(compress).collect();
        let members: Vec<u8> = by(|part| gzip(6, part));
        let frames: Vec<u8> = by(|part| zstd_frame(3, part));
        for (blob, compression) in [(members, Compression::Gzip), (frames, Compression::Zstd)] {
            let index = check(&blob, &plain, 10_000);
            assert_eq!((index.chunks.len(), index.compression), (chunks, compression), "{len}");
            assert!(index.windows.is_empty());
        }
    }
}

#[test]
fn small_and_odd_blobs() {
    let plain = data(3, 5000);
    let named = |part: &[u8]| {
        let builder = GzBuilder::new().filename("a").comment("b").extra(vec![1; 300]).mtime(7);
        let mut encoder = builder.write(Vec::new(), Level::default());
        encoder.write_all(part).unwrap();
        encoder.finish().unwrap()
    };
    let skippable = [&[0x53, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"12345"].concat();
    let frame = zstd_frame(1, &plain);
    for (name, blob, expected) in [
        ("nothing at all", vec![], &[][..]),
        ("stored", plain.clone(), &plain[..]),
        ("stored, short", b"abc".to_vec(), b"abc"),
        ("empty member", gzip(6, b""), b""),
        ("all header fields", named(&plain), &plain),
        (
            "members, empty ones among them",
            [gzip(6, b""), named(&plain), gzip(6, b"")].concat(),
            &plain,
        ),
        ("zeros behind", [gzip(6, &plain), vec![0; 1000]].concat(), &plain),
        ("frame", frame.clone(), &plain),
        ("frame between skippable ones", [&skippable[..], &frame, &skippable].concat(), &plain),
        ("skippable only", skippable, b""),
    ] {
        for step in [1, 3, 4, 5, 1000, 1 << 20] {
            let index = check(&blob, expected, step);
            assert_eq!(index.blob_len, blob.len() as u64, "{name}");
        }
    }
}

/// A member as another program may write it: header fields by hand.
#[test]
fn header_checksums() {
    let body = gzip(6, b"hello")[10..].to_vec();
    let mut header = vec![0x1f, 0x8b, 8, 2 | 8, 0, 0, 0, 0, 0, 3, b'n', 0];
    let crc = crc32fast::hash(&header);
    header.extend_from_slice(&(crc as u16).to_le_bytes());
    check(&[&header[..], &body].concat(), b"hello", 1);
    header[12] ^= 1;
    let (_, result) = decode(&[&header[..], &body].concat(), 1);
    assert!(matches!(result, Err(Error::Header { at: 13, .. })), "{result:?}");
}

#[test]
fn damaged_blobs_are_refused() {
    let plain = data(4, 3000);
    let (gz, zs) = (gzip(6, &plain), zstd_frame(3, &plain));
    let with = |blob: &[u8], at: usize, byte: u8| {
        let mut blob = blob.to_vec();
        blob[at] = byte;
        blob
    };
    let n = gz.len();
    type Expected = fn(&Error) -> bool;
    let rows: [(&str, Vec<u8>, Expected); 10] = [
        ("header only", gz[..10].to_vec(), |e| matches!(e, Error::Truncated { at: 10 })),
        ("cut in the stream", gz[..n / 2].to_vec(), |e| matches!(e, Error::Truncated { .. })),
        ("cut in the trailer", gz[..n - 1].to_vec(), |e| matches!(e, Error::Truncated { .. })),
        ("cut in a second member", [&gz[..], &gz[..5]].concat(), |e| {
            matches!(e, Error::Truncated { .. })
        }),
        ("wrong CRC", with(&gz, n - 8, gz[n - 8] ^ 1), |e| matches!(e, Error::Checksum { .. })),
        ("wrong length", with(&gz, n - 1, 9), |e| matches!(e, Error::Checksum { .. })),
        ("garbage behind", [&gz[..], b"x"].concat(), |e| matches!(e, Error::Garbage { .. })),
        ("garbage behind zeros", [&gz[..], b"\0\x1f"].concat(), |e| {
            matches!(e, Error::Garbage { .. })
        }),
        ("bad block type", with(&gz, 10, 7), |e| matches!(e, Error::Inflate { at: 10, .. })),
        ("cut frame", zs[..zs.len() - 1].to_vec(), |e| matches!(e, Error::Truncated { .. })),
    ];
    for (name, blob, expected) in rows {
        for step in [1, 1 << 20] {
            let error = decode(&blob, step).1.expect_err(name);
            assert!(expected(&error), "{name}: {error:?}");
        }
    }
    let (_, garbage) = decode(&[&zs[..], b"garbage"].concat(), 100);
    assert!(matches!(garbage, Err(Error::Zstd { .. })), "{garbage:?}");
}

/// A window of 2 GiB is refused instead of allocated.
#[test]
fn large_zstd_windows_are_refused() {
    let blob = [0x28, 0xb5, 0x2f, 0xfd, 0, (31 - 10) << 3, 1, 0, 0];
    assert!(matches!(decode(&blob, 100).1, Err(Error::Zstd { .. })));
}

#[test]
fn bombs_stop_at_the_limit() {
    let zeros = vec![0; 20 << 20];
    for blob in [gzip(9, &zeros), zstd_frame(9, &zeros), zeros] {
        let mut out = 0;
        let mut decoder = Decoder::new(1 << 20);
        let mut result = Ok(());
        for part in blob.chunks(4096) {
            result = result.and_then(|()| decoder.push(part, &mut |bytes| out += bytes.len()));
        }
        let result = result.and_then(|()| decoder.finish(&mut |_| ()).map(|_| ()));
        assert!(matches!(result, Err(Error::TooLarge { limit: 0x10_0000 })), "{result:?}");
        assert!(out <= (1 << 20) + (256 << 10), "{out}");
    }
}

/// A chunk entry that lies about its length yields no more than it says, and an error if less.
#[test]
fn lying_chunks() {
    let plain = data(5, 3 << 20);
    let blob = gzip(6, &plain);
    let good = index_of(decode(&blob, 1 << 20).1.unwrap());
    let bytes = |index: &LayerIndex, i: usize| {
        blob[index.chunks[i].blob.start as usize..index.chunks[i].blob.end as usize].to_vec()
    };
    let mut out = Vec::new();
    let mut index = good.clone();
    index.chunks[1].data.end -= 1000;
    decode_chunk(&index, 1, &bytes(&index, 1), &mut out).unwrap();
    assert_eq!(out.len() as u64, good.chunks[1].data.end - good.chunks[1].data.start - 1000);
    index.chunks[1].data.end += 1 << 40;
    let result = decode_chunk(&index, 1, &bytes(&index, 1), &mut out);
    assert!(result.is_err() && out.capacity() < 64 << 20);
    let short = decode_chunk(&good, 1, &bytes(&good, 1)[1..], &mut out);
    assert!(matches!(short, Err(Error::CompressedLength { chunk: 1, .. })), "{short:?}");
    assert!(matches!(decode_chunk(&good, 99, &[], &mut out), Err(Error::NoChunk { chunk: 99 })));
    let mut index = good.clone();
    index.windows[5..40].fill(0xff);
    let damaged = decode_chunk(&index, 1, &bytes(&index, 1), &mut out);
    assert!(matches!(damaged, Err(Error::Window { chunk: 1, .. })), "{damaged:?}");
}

/// How to compress one part of a blob.
#[derive(Clone, Debug)]
enum Part {
    Gzip(u32),
    /// Flushed every so many bytes: empty stored blocks.
    Flushed(usize),
}

fn parts() -> impl Strategy<Value = Vec<(Part, usize)>> {
    let part =
        prop_oneof![(0..=9u32).prop_map(Part::Gzip), (1000..200_000usize).prop_map(Part::Flushed)];
    let len = prop_oneof![0..100_000usize, 0..3_000_000usize, Just(SPAN as usize)];
    proptest::collection::vec((part, len), 1..5)
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]

    #[test]
    fn any_gzip_decodes_alike_however_it_is_pushed(seed: u64, parts in parts(), step in 1..300_000usize) {
        let (mut blob, mut plain) = (Vec::new(), Vec::new());
        for (i, (part, len)) in parts.iter().enumerate() {
            let bytes = data(seed.wrapping_add(i as u64 * 7919), *len);
            match part {
                Part::Gzip(level) => blob.extend(gzip(*level, &bytes)),
                Part::Flushed(every) => {
                    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Level::new(6));
                    for bytes in bytes.chunks(*every) {
                        encoder.write_all(bytes).unwrap();
                        encoder.flush().unwrap();
                    }
                    blob.extend(encoder.finish().unwrap());
                }
            }
            plain.extend(bytes);
        }
        let index = check(&blob, &plain, step);
        prop_assert_eq!(&index_of(decode(&blob, 977).1.unwrap()), &index);
        prop_assert_eq!(&index_of(decode(&blob, usize::MAX).1.unwrap()), &index);
    }

    #[test]
    fn any_zstd_decodes_alike_however_it_is_pushed(seed: u64, lens in proptest::collection::vec((0..600_000usize, -3..8i32), 1..6), step in 1..100_000usize) {
        let (mut blob, mut plain) = (Vec::new(), Vec::new());
        for (i, (len, level)) in lens.iter().enumerate() {
            let bytes = data(seed.wrapping_add(i as u64 * 7919), *len);
            blob.extend(zstd_frame(*level, &bytes));
            plain.extend(bytes);
        }
        let index = check(&blob, &plain, step);
        prop_assert_eq!(index_of(decode(&blob, usize::MAX).1.unwrap()), index);
    }

    #[test]
    fn damage_never_panics(seed: u64, flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4), cut: proptest::sample::Index, zstd: bool) {
        let plain = data(seed, 300_000);
        let mut blob = if zstd { zstd_frame(3, &plain) } else { gzip(6, &plain) };
        for (at, byte) in flips {
            let at = at.index(blob.len());
            blob[at] = byte;
        }
        blob.truncate(cut.index(blob.len()) + 1);
        let (out, _) = decode(&blob, 5000);
        prop_assert!(out.len() <= 1 << 30);
    }

    #[test]
    fn arbitrary_bytes_never_panic(magic in 0..3usize, bytes in proptest::collection::vec(any::<u8>(), 0..3000), step in 1..100usize) {
        let magic = [&b""[..], &[0x1f, 0x8b, 8], &[0x28, 0xb5, 0x2f, 0xfd]][magic];
        let _ = decode(&[magic, &bytes].concat(), step);
    }
}
