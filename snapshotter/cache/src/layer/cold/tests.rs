//! Punching under readers, decoders and crashes: whoever reads, reads what was written.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::{
    Just, ProptestConfig, Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest,
};
use skimmer_proto::Digest;

use super::*;
use crate::space::Space;

const CHUNK: u64 = 8192;

/// Chunk `n` is the bytes from `n * CHUNK` on, and the byte `n` of an overflow area.
struct Plain {
    chunks: usize,
}

impl Spans for Plain {
    fn spans(&self, chunk: usize) -> Vec<Range<u64>> {
        let (start, over) = (chunk as u64 * CHUNK, (self.chunks + 1) as u64 * CHUNK - 1);
        vec![start..start + CHUNK, over - chunk as u64..over - chunk as u64 + 1]
    }
}

fn byte(chunk: usize) -> u8 {
    u8::try_from(chunk % 200).unwrap() + 1
}

struct Layer {
    data: LayerData,
    spans: Arc<Plain>,
}

impl Layer {
    fn open(dir: &Path, chunks: usize) -> Self {
        let (len, space) = ((chunks as u64 + 1) * CHUNK, Arc::new(Space::new(u64::MAX)));
        let data =
            LayerData::open(Digest::of(b""), dir, None, (len, chunks), [7; 32], &space).unwrap();
        let spans = Arc::new(Plain { chunks });
        data.allow_punching(Arc::downgrade(&(Arc::clone(&spans) as Arc<dyn Spans>)));
        Self { data, spans }
    }

    fn decode(&self, chunk: usize) {
        let _hold = self.data.hold();
        if self.data.has(chunk) {
            return;
        }
        for range in self.spans.spans(chunk) {
            let bytes = vec![byte(chunk); usize::try_from(range.end - range.start).unwrap()];
            self.data.file().write_all_at(&bytes, range.start).unwrap();
        }
        self.data.mark(chunk);
    }

    /// What a reader gets, if the chunk is there.
    fn read(&self, chunk: usize) -> Option<Vec<u8>> {
        let _hold = self.data.hold();
        self.data.has(chunk).then(|| {
            let mut all = Vec::new();
            for range in self.spans.spans(chunk) {
                let mut part = vec![0; usize::try_from(range.end - range.start).unwrap()];
                self.data.file().read_exact_at(&mut part, range.start).unwrap();
                all.extend(part);
            }
            all
        })
    }

    fn is_right(&self, chunk: usize) -> bool {
        self.read(chunk).is_none_or(|bytes| bytes.iter().all(|b| *b == byte(chunk)))
    }
}

#[test]
fn cold_chunks_go_from_bitmap_and_disk() {
    let dir = tempfile::tempdir().unwrap();
    let layer = Layer::open(dir.path(), 64);
    (0..60).for_each(|chunk| layer.decode(chunk));
    layer.data.checkpoint().unwrap();
    layer.data.touch(5);
    let blocks = || {
        let metadata = layer.data.file().metadata().unwrap();
        std::os::unix::fs::MetadataExt::blocks(&metadata) * 512
    };
    let before = blocks();
    assert!(layer.data.cold_bytes().abs_diff(59 * CHUNK) < 2 * CHUNK);
    let freed = layer.data.punch_cold(20 * CHUNK).unwrap();
    assert!((20 * CHUNK..21 * CHUNK).contains(&freed), "{freed}");
    assert!(blocks() <= before - 19 * CHUNK, "{} of {before}", blocks());
    assert!(layer.data.has(5) && !layer.data.has(4) && layer.data.has(59));
    let again = Layer::open(dir.path(), 64);
    assert_eq!(again.data.missing(0..60).len(), 20);
    assert!((0..64).all(|chunk| again.is_right(chunk)));
}

#[test]
fn what_is_complete_kept_or_unknown_stays() {
    let dir = tempfile::tempdir().unwrap();
    let layer = Layer::open(dir.path(), 4);
    (0..3).for_each(|chunk| layer.decode(chunk));
    let keep = layer.data.keep();
    assert_eq!((layer.data.cold_bytes(), layer.data.punch_cold(u64::MAX).unwrap()), (0, 0));
    drop(keep);
    layer.decode(3);
    assert_eq!(layer.data.punch_cold(u64::MAX).unwrap(), 0, "complete");
    let dir = tempfile::tempdir().unwrap();
    let Layer { data, spans } = Layer::open(dir.path(), 4);
    data.mark(0);
    drop(spans);
    assert_eq!(data.punch_cold(u64::MAX).unwrap(), 0, "nobody knows where it is");
}

/// Half of the readers don't touch what they read, so that it goes under their hands.
#[test]
fn readers_never_see_a_hole() {
    const CHUNKS: usize = 400;
    let dir = tempfile::tempdir().unwrap();
    let (layer, done) = (Layer::open(dir.path(), CHUNKS), AtomicBool::new(false));
    let read_on = |reader: usize| {
        let mut step = 0;
        while !done.load(Ordering::Relaxed) {
            step += 1;
            // The last chunk never comes: a complete file isn't punched.
            let chunk = (step * (reader * 2 + 3)) % (CHUNKS - 1);
            if reader.is_multiple_of(2) && chunk < CHUNKS / 4 {
                layer.data.touch(chunk);
            }
            layer.decode(chunk);
            assert!(layer.is_right(chunk), "chunk {chunk}");
            thread::sleep(Duration::from_micros(100));
        }
    };
    thread::scope(|scope| {
        let read_on = &read_on;
        let readers: Vec<_> = (0..4).map(|reader| scope.spawn(move || read_on(reader))).collect();
        let (started, mut punched) = (Instant::now(), 0);
        while punched < 200 * CHUNK && started.elapsed() < Duration::from_secs(60) {
            punched += layer.data.punch_cold(u64::MAX).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().expect("it saw what was written");
        }
        assert!(punched > 0, "nothing was punched, nothing was tested");
    });
    let touched = |chunk: &usize| layer.data.usage.touched.get(*chunk);
    assert!((0..CHUNKS).filter(touched).all(|chunk| layer.data.has(chunk)));
}

#[derive(Clone, Debug)]
enum Step {
    Decode(usize),
    Touch(usize),
    Punch(u64),
    Checkpoint,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..9usize).prop_map(Step::Decode),
        1 => (0..9usize).prop_map(Step::Touch),
        2 => (0..10 * CHUNK).prop_map(Step::Punch),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    // Each syncs files several times.
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_counts_as_present_is_right_and_what_was_touched_stays(
        steps in vec(step(), 1..40), wanted in any::<u16>()
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = Layer::open(dir.path(), 10);
        let mut pledged: Vec<usize> = Vec::new();
        for step in steps {
            match step {
                Step::Decode(chunk) => layer.decode(chunk),
                Step::Touch(chunk) => {
                    layer.data.touch(chunk);
                    layer.decode(chunk);
                    pledged.push(chunk);
                }
                Step::Punch(wanted) => {
                    let cold = layer.data.cold_bytes();
                    let freed = layer.data.punch_cold(wanted).unwrap();
                    prop_assert!(freed <= wanted + CHUNK + 1);
                    prop_assert_eq!(freed == 0, cold == 0 || wanted == 0);
                }
                Step::Checkpoint => layer.data.checkpoint().unwrap(),
                Step::Crash => {
                    layer = Layer::open(dir.path(), 10);
                    pledged.clear();
                }
            }
            prop_assert!((0..10).all(|chunk| layer.is_right(chunk)));
            prop_assert!(pledged.iter().all(|chunk| layer.data.has(*chunk)));
        }
        layer.data.punch_cold(wanted.into()).unwrap();
        let after = Layer::open(dir.path(), 10);
        prop_assert!((0..10).all(|chunk| after.is_right(chunk)));
    }
}
