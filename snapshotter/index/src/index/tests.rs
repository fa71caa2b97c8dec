//! Hand-made indexes, and damaged ones.

#![expect(clippy::cast_possible_truncation, reason = "test blobs are small")]
#![expect(clippy::single_range_in_vec_init, reason = "runs of chunks are ranges")]

use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::{Error, LayerIndex, Layout};
use crate::chunk::{Chunk, State};
use crate::codec::Compression;
use crate::erofs::Copy;

fn chunk(data: std::ops::Range<u64>, blob: std::ops::Range<u64>, state: State) -> Chunk {
    Chunk { data, blob, state }
}

fn sample() -> LayerIndex {
    let window = |range| State::Gzip { bit: 3, window: Some(range) };
    LayerIndex {
        compression: Compression::Gzip,
        layout: Layout::Tar,
        blob_len: 1000,
        tar_len: 3000,
        data_len: 4096,
        inodes: vec![7; 5000],
        copies: vec![
            Copy { from: 2000, to: 3072, len: 700 },
            Copy { from: 100, to: 3772, len: 10 },
        ],
        chunks: vec![
            chunk(0..1000, 0..400, State::Gzip { bit: 0, window: None }),
            chunk(1000..2100, 399..500, window(0..6)),
            chunk(2100..3000, 500..990, window(6..9)),
        ],
        windows: b"windows!!".to_vec(),
    }
}

#[test]
fn round_trip() {
    let index = sample();
    assert_eq!(LayerIndex::decode(&index.encode().unwrap()).unwrap(), index);
    let mut empty = LayerIndex { chunks: vec![], windows: vec![], copies: vec![], ..sample() };
    (empty.tar_len, empty.blob_len) = (0, 0);
    assert_eq!(LayerIndex::decode(&empty.encode().unwrap()).unwrap(), empty);
}

#[test]
fn chunks_covering() {
    let index = sample();
    for (range, expected) in [
        (0..1, vec![0..1]),
        (0..1000, vec![0..1]),
        (999..1001, vec![0..2]),
        (2999..3000, vec![2..3]),
        (3000..3072, vec![]),
        (3072..3073, vec![1..2]),
        (3172..3173, vec![2..3]),
        (3073..3500, vec![1..3]),
        (3771..3773, vec![0..1, 2..3]),
        (0..4096, vec![0..3]),
        (3782..4096, vec![]),
        (5..5, vec![]),
        (9000..9999, vec![]),
    ] {
        assert_eq!(index.chunks_covering(range.clone()), expected, "{range:?}");
    }
    assert_eq!(index.blob_range(1..3), 399..990);
    assert_eq!(index.blob_range(2..2), 0..0);
}

#[test]
fn copies_from() {
    let index = sample();
    let parts = |chunk| index.copies_from(chunk);
    assert_eq!(parts(0), [Copy { from: 100, to: 3772, len: 10 }]);
    assert_eq!(parts(1), [Copy { from: 2000, to: 3072, len: 100 }]);
    assert_eq!(parts(2), [Copy { from: 2100, to: 3172, len: 600 }]);
    assert_eq!(parts(3), []);
}

#[test]
fn what_a_reader_refuses() {
    type Change = fn(&mut LayerIndex);
    let rows: [(&str, Change); 14] = [
        ("data not whole blocks", |i| i.data_len = 4095),
        ("tar longer than the data", |i| i.tar_len = 5000),
        ("huge", |i| i.data_len = 1 << 45),
        ("chunks too short", |i| i.chunks[2].data.end = 2999),
        ("no chunk", |i| (i.chunks, i.windows) = (vec![], vec![])),
        ("gap", |i| i.chunks[1].data.start = 1001),
        ("behind the blob", |i| i.chunks[2].blob.end = 1001),
        ("nothing compressed", |i| i.chunks[2].blob.end = 500),
        ("going back", |i| i.chunks[0].blob = 450..460),
        ("bit 8", |i| i.chunks[1].state = State::Gzip { bit: 8, window: Some(0..6) }),
        ("windows left over", |i| i.windows.push(1)),
        ("copy from outside", |i| i.copies[0].from = 2999),
        ("copy into the tar", |i| i.copies[0].to = 2999),
        ("overlapping sources", |i| i.copies[1].from = 2005),
    ];
    for (name, change) in rows {
        let mut index = sample();
        change(&mut index);
        assert!(LayerIndex::decode(&index.encode().unwrap()).is_err(), "{name}");
    }
    let stored = LayerIndex { compression: Compression::Stored, ..sample() };
    assert!(LayerIndex::decode(&stored.encode().unwrap()).is_err());
}

/// A section that decompresses to more, or less, than it declares; bytes missing or too many.
#[test]
fn lying_lengths() {
    let bytes = sample().encode().unwrap();
    for (at, byte) in [(48, 0x89), (48, 0x87), (64, 1), (40, 1), (88, 1), (55, 0x80)] {
        let mut bytes = bytes.clone();
        bytes[at] = byte;
        assert!(LayerIndex::decode(&bytes).is_err(), "{at}");
    }
    for len in 0..bytes.len() {
        assert!(LayerIndex::decode(&bytes[..len]).is_err(), "{len}");
    }
    let longer = [&bytes[..], b"x"].concat();
    assert!(matches!(LayerIndex::decode(&longer), Err(Error::Length { .. })));
}

proptest! {
    #[test]
    fn any_columns_round_trip(lens in proptest::collection::vec((1..1u64 << 40, 1..1u64 << 40), 0..40), gzip: bool) {
        let (mut data, mut blob, mut window) = (0, 0, 0u32);
        let chunks: Vec<Chunk> = lens.iter().enumerate().map(|(i, (data_len, blob_len))| {
            let (from, start) = (data, blob);
            (data, blob) = (data + data_len, blob + blob_len);
            let state = match (gzip, i % 3) {
                (false, _) => State::ZstdFrame,
                (true, 0) => State::Gzip { bit: 0, window: None },
                (true, _) => {
                    window += 7;
                    State::Gzip { bit: (i % 8) as u8, window: Some(window - 7..window) }
                }
            };
            chunk(from..data, start..blob, state)
        }).collect();
        let compression = if gzip { Compression::Gzip } else { Compression::Zstd };
        let index = LayerIndex {
            compression, blob_len: blob, tar_len: data, data_len: data.next_multiple_of(512),
            copies: vec![], chunks, windows: vec![3; window as usize], ..sample()
        };
        let decoded = LayerIndex::decode(&index.encode().unwrap());
        if data < 1 << 44 && blob < 1 << 44 {
            prop_assert_eq!(decoded.unwrap(), index);
        } else {
            prop_assert!(decoded.is_err());
        }
    }

    #[test]
    fn flipped_bytes_never_panic(flips in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..5)) {
        let mut bytes = sample().encode().unwrap();
        for (at, byte) in flips {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(index) = LayerIndex::decode(&bytes) {
            let last = index.chunks.last().map_or(0, |chunk| chunk.data.end);
            prop_assert_eq!(last, index.tar_len);
            index.chunks_covering(0..u64::MAX);
            for (i, chunk) in index.chunks.iter().enumerate() {
                index.copies_from(i);
                let compressed = vec![0; (chunk.blob.end - chunk.blob.start) as usize];
                let _ = crate::chunk::decode_chunk(&index, i, &compressed, &mut Vec::new());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), columns: bool) {
        let bytes = if columns {
            // Past the header and the compression: arbitrary columns.
            let good = sample().encode().unwrap();
            let packed = zstd::bulk::compress(&bytes, 1).unwrap();
            let mut out = good[..40].to_vec();
            let inodes_len = usize::from(good[40]);
            for (len, plain) in [(inodes_len, 5000), (packed.len(), bytes.len()), (packed.len(), bytes.len()), (9, 9)] {
                out.extend_from_slice(&(len as u64).to_le_bytes());
                out.extend_from_slice(&(plain as u64).to_le_bytes());
            }
            out.extend_from_slice(&good[104..104 + inodes_len]);
            [&out[..], &packed, &packed, b"windows!!"].concat()
        } else {
            bytes
        };
        let _ = LayerIndex::decode(&bytes);
    }
}
