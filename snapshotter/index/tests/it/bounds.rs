//! Hostile input takes no more memory than its length warrants, whatever it declares.
//!
//! Counts what the tested thread allocates in Rust; zstd's own buffers are as large as its windows,
//! which the codecs bound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;

use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any, prop_assert, proptest};
use proptest::sample::Index;
use skimmer_index::build::{BlobSums, DataScan, assemble};
use skimmer_index::codec::Decoder;
use skimmer_index::erofs::Inodes;
use skimmer_index::index::LayerIndex;
use skimmer_index::tar::{Limits, TarWalk};
use skimmer_index::toc::{self, FOOTER_LEN, Toc};
use skimmer_index::tree::TreeBuilder;

/// What any input may take.
const FLOOR: usize = 2 << 20;
/// What each of its bytes may take.
const FACTOR: usize = 64;

thread_local! {
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(change: isize) {
    // At a thread's end there is nothing left to count in.
    let _ = NOW.try_with(|now| {
        now.set(now.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

fn signed(len: usize) -> isize {
    isize::try_from(len).unwrap_or(isize::MAX)
}

#[expect(unsafe_code, reason = "an allocator that counts is an allocator")]
// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller keeps `alloc_zeroed`'s contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: the caller keeps `dealloc`'s contract.
        unsafe { System.dealloc(at, layout) }
    }
}

/// The most that was allocated at once while `work` ran.
fn peak<T>(work: impl FnOnce() -> T) -> usize {
    let start = NOW.get();
    PEAK.set(start);
    drop(work());
    usize::try_from(PEAK.get() - start).unwrap_or(0)
}

fn is_bounded(bytes: &[u8], work: impl FnOnce()) -> bool {
    let (peak, bound) = (peak(work), FLOOR + FACTOR * bytes.len());
    if peak > bound {
        eprintln!("{peak} bytes for an input of {}, at most {bound}", bytes.len());
    }
    peak <= bound
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn sample_tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for n in 0..60_u8 {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::from(n) * 40);
        header.set_mode(0o644);
        let name = format!("dir-{}/{}", n % 7, "name".repeat(usize::from(n)));
        builder.append_data(&mut header, name, &vec![n; usize::from(n) * 40][..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn sample_index() -> Vec<u8> {
    let blob = gzip(&sample_tar());
    let mut sums = BlobSums::new(blob.len() as u64).unwrap();
    let (mut decoder, mut scan) = (Decoder::new(1 << 30), DataScan::new(Limits::default()));
    sums.push(&blob).unwrap();
    let mut take = |bytes: &[u8]| scan.push(bytes).unwrap();
    decoder.push(&blob, &mut take).unwrap();
    let decoded = decoder.finish(&mut take).unwrap();
    assemble(sums.finish().unwrap(), decoded, scan.finish().unwrap()).unwrap().encoded
}

/// An eStargz blob with nothing but a table of contents and a footer.
fn sample_toc(json: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(json.len() as u64);
    builder.append_data(&mut header, "stargz.index.json", json).unwrap();
    let mut blob = gzip(&builder.into_inner().unwrap());
    blob.extend(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
    blob.extend(format!("{:016x}STARGZ", 0).bytes());
    blob.extend(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
    blob
}

fn damaged(bytes: &[u8], flips: &[(Index, u8)]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, with) in flips {
        let at = at.index(bytes.len());
        bytes[at] = *with;
    }
    bytes
}

fn read_index(bytes: &[u8]) {
    if let Ok(index) = LayerIndex::decode(bytes) {
        let _ = Inodes::open(&index.inodes, index.data_len);
    }
}

fn read_tar(bytes: &[u8]) {
    let (mut walk, mut tree) =
        (TarWalk::new(Limits::default()), TreeBuilder::new(Limits::default()));
    if walk.push(bytes, &mut |entry| tree.insert(entry).map_err(Into::into)).is_ok() {
        let _ = (walk.finish(), tree.finish());
    }
}

fn read_toc(blob: &[u8]) {
    let len = blob.len() as u64;
    let footer = usize::try_from(len.saturating_sub(FOOTER_LEN)).unwrap();
    let Some(place) = toc::find(&blob[footer..], len) else { return };
    let range = [place.blob.start, place.blob.end].map(|at| usize::try_from(at).unwrap());
    if let Ok(found) = toc::read(&place, &blob[range[0]..range[1]]) {
        let _ = Toc::new(found, len, Limits::default());
    }
}

#[test]
fn what_is_right_is_read_within_the_bounds() {
    let (index, tar) = (sample_index(), sample_tar());
    assert!(LayerIndex::decode(&index).is_ok());
    assert!(is_bounded(&index, || read_index(&index)));
    assert!(is_bounded(&tar, || read_tar(&tar)));
    let blob = sample_toc(br#"{"version":1,"entries":[]}"#);
    assert!(toc::find(&blob[blob.len() - 51..], blob.len() as u64).is_some());
    assert!(is_bounded(&blob, || read_toc(&blob)));
}

#[test]
fn the_allocator_counts() {
    assert!((1000..3000).contains(&peak(|| vec![1_u8; 1000])));
    assert!(!is_bounded(b"", || drop(std::hint::black_box(vec![1_u8; FLOOR + 1]))));
}

/// Lengths that promise far more than there is.
#[test]
fn declared_lengths_are_not_believed() {
    let (index, tar) = (sample_index(), sample_tar());
    for at in 0..index.len().min(200) {
        for byte in [0x7f, 0xff] {
            let lie = damaged_at(&index, at, byte);
            assert!(is_bounded(&lie, || read_index(&lie)), "byte {at}");
        }
    }
    for (kind, size) in [(b'x', 1_u64 << 20), (b'L', 1 << 20), (b'0', 1 << 32), (b'x', 1 << 32)] {
        let mut lie = tar.clone();
        lie[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        lie[156] = kind;
        lie[148..156].copy_from_slice(b"        ");
        let sum: u32 = lie[..512].iter().map(|byte| u32::from(*byte)).sum();
        lie[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        assert!(is_bounded(&lie, || read_tar(&lie)), "{kind} of {size}");
    }
    let entry = r#"{"name":"x","type":"reg","size":9e18,"offset":1,"chunkSize":1}"#;
    let blob = sample_toc(format!(r#"{{"version":1,"entries":[{entry}]}}"#).as_bytes());
    assert!(is_bounded(&blob, || read_toc(&blob)));
}

fn damaged_at(bytes: &[u8], at: usize, with: u8) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at] = with;
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn noise_takes_what_its_length_warrants(bytes in vec(any::<u8>(), 0..5000)) {
        for read in [read_index, read_tar, read_toc] {
            prop_assert!(is_bounded(&bytes, || read(&bytes)));
        }
    }

    #[test]
    fn damage_takes_what_its_length_warrants(flips in vec((any::<Index>(), any::<u8>()), 1..8)) {
        let json = br#"{"version":1,"entries":[{"name":"d/","type":"dir","mode":16877},
            {"name":"d/f","type":"reg","size":5000,"offset":0,"chunkSize":4000},
            {"name":"d/f","type":"chunk","offset":10,"chunkOffset":4000,"chunkSize":1000}]}"#;
        let toc = sample_toc(&damaged(json, &flips));
        prop_assert!(is_bounded(&toc, || read_toc(&toc)));
        for (read, good) in [
            (read_index as fn(&[u8]), sample_index()),
            (read_tar, sample_tar()),
            (read_toc, sample_toc(json)),
        ] {
            let bytes = damaged(&good, &flips);
            prop_assert!(is_bounded(&bytes, || read(&bytes)));
        }
    }
}
