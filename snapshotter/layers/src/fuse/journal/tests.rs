//! Journals that are left and found again.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt as _;
use std::thread;

use proptest::prelude::{ProptestConfig, Strategy, any, prop_assert_eq, prop_oneof, proptest};

use super::super::request::Operation;
use super::*;

fn lookup(unique: u64, name: &[u8]) -> Request {
    Request::new(unique, 1, &Operation::Lookup { name }).unwrap()
}

/// As the next process finds it when the one that writes it dies now: what that one does later changes nothing.
fn died(journal: &Journal) -> (Arc<Journal>, Left) {
    let copy = File::from(memfd_create(c"copy", MFdFlags::MFD_CLOEXEC).unwrap());
    copy.set_len(BYTES as u64).unwrap();
    let copy_of = |from: usize, len: usize| {
        let mut bytes = vec![0; len];
        journal.file.read_exact_at(&mut bytes, from as u64).unwrap();
        copy.write_all_at(&bytes, from as u64).unwrap();
    };
    copy_of(0, WORDS * WORD_BYTES);
    let used = |page: &usize| journal.label(*page, 0).load(Ordering::Relaxed) != 0;
    (0..PAGES).filter(used).for_each(|n| copy_of(FIRST_PAGE + n * PAGE_BYTES, PAGE_BYTES));
    Journal::left(copy.into()).unwrap()
}

/// Mounts, and the numbers and requests of each, as the next process finds them.
fn left(journal: &Journal) -> BTreeMap<u64, (u64, BTreeSet<Vec<u8>>)> {
    let left = died(journal).1;
    let bytes = |taken: &Taken| taken.requests.iter().map(|(r, _)| r.bytes().to_vec()).collect();
    left.iter().map(|(mount, taken)| (*mount, (taken.last, bytes(taken)))).collect()
}

#[test]
fn what_was_not_answered_is_found_until_it_is() {
    let journal = Journal::new().unwrap();
    let recorder = journal.recorder(7).unwrap();
    let answered = recorder.record(&lookup(2, b"answered")).unwrap();
    let waiting = recorder.record(&lookup(4, &[b'x'; 255])).unwrap();
    recorder.took(6);
    drop(answered);
    let request = lookup(4, &[b'x'; 255]).bytes().to_vec();
    let expected = BTreeMap::from([(7, (6, BTreeSet::from([request])))]);
    assert_eq!(left(&journal), expected);
    let (next, found) = died(&journal);
    drop((recorder, waiting));
    let recorder = next.recorder(7).unwrap();
    assert_eq!(left(&next), expected);
    drop(found);
    assert_eq!(left(&next), BTreeMap::from([(7, (6, BTreeSet::new()))]));
    drop(recorder);
    assert!(left(&next).is_empty());
}

#[test]
fn mounts_and_requests_are_bounded() {
    let journal = Journal::new().unwrap();
    let recorder = journal.recorder(1).unwrap();
    let record = |n: usize| recorder.record(&lookup(2 * n as u64, b"x"));
    let mut entries: Vec<_> = (1..=SLOTS).map(|n| record(n).unwrap()).collect();
    assert!(record(SLOTS + 1).is_none());
    entries.pop();
    entries.push(record(SLOTS + 2).unwrap());
    let (last, requests) = &left(&journal)[&1];
    assert_eq!((*last, requests.len()), (2 * (SLOTS as u64 + 2), SLOTS));
    let mut recorders: Vec<_> =
        (2..=SEATS as u64).map(|mount| journal.recorder(mount).unwrap()).collect();
    let another = SEATS as u64 + 1;
    assert!(journal.recorder(another).is_none());
    recorders.pop();
    assert!(journal.recorder(another).is_some());
}

#[test]
fn mounts_are_forgotten() {
    let journal = Journal::new().unwrap();
    let recorder = journal.recorder(2).unwrap();
    let (next, _) = died(&journal);
    drop(recorder);
    assert!(left(&next).contains_key(&2));
    next.forget(2);
    assert!(left(&next).is_empty());
}

#[test]
fn many_threads_write_at_once() {
    let journal = Journal::new().unwrap();
    let shared = journal.recorder(9).unwrap();
    let name = |unique: u64| vec![b'x'; 1 + (unique % 255) as usize];
    let kept = thread::scope(|scope| {
        let threads = [0, 1, 2, 3].map(|thread| {
            let shared = &shared;
            scope.spawn(move || {
                let mut kept = Vec::new();
                for n in 1..4000u64 {
                    let unique = 2 * (4 * n + thread);
                    let entry = shared.record(&lookup(unique, &name(unique))).unwrap();
                    if n % 8 == 0 {
                        kept.push((unique, entry));
                    }
                }
                kept
            })
        });
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let expected = kept.iter().map(|(n, _)| lookup(*n, &name(*n)).bytes().to_vec()).collect();
    assert_eq!(left(&journal), BTreeMap::from([(9, (2 * (4 * 3999 + 3), expected))]));
    drop((kept, shared));
    assert!(left(&journal).is_empty());
}

#[test]
fn what_the_kernel_wrote_is_found_until_it_is_written_down() {
    crate::fuse::device::bound_idle_memory();
    let journal = Journal::new().unwrap();
    let recorder = journal.recorder(5).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // As long as fuser's: it is a mapping of its own.
            let mut buffer = vec![0u8; 16 << 20];
            let mut take = |request: &Request| {
                buffer[..request.bytes().len()].copy_from_slice(request.bytes());
                buffer.as_ptr()
            };
            let (first, second) = (lookup(2, b"first"), lookup(4, b"second"));
            recorder.meet(take(&first));
            assert_eq!(left(&journal)[&5].1, BTreeSet::from([first.bytes().to_vec()]));
            let entry = recorder.record(&first);
            assert_eq!(left(&journal)[&5].1, BTreeSet::from([first.bytes().to_vec()]));
            recorder.meet(take(&second));
            let both = [&first, &second].map(|request| request.bytes().to_vec());
            assert_eq!(left(&journal)[&5].1, BTreeSet::from(both));
            drop(entry);
            drop(recorder.record(&second));
            assert!(left(&journal)[&5].1.is_empty());
            // Nobody would wait for an answer to this.
            recorder.meet(take(&lookup(6, b"third")));
            recorder.took(6);
            assert!(left(&journal)[&5].1.is_empty());
            recorder.meet(take(&lookup(8, b"fourth")));
            // The next process has it in a slot by now.
            let (next, found) = died(&journal);
            assert_eq!(next.free().pages.len(), PAGES);
            assert_eq!(left(&next)[&5].1.len(), 1);
            drop(found);
            assert!(left(&next)[&5].1.is_empty());
        });
    });
    drop(recorder);
    assert_eq!(journal.free().pages.len(), PAGES);
    assert!(left(&journal).is_empty());
}

#[test]
fn another_layout_is_no_journal() {
    let other = tempfile::tempfile().unwrap();
    assert!(Journal::left(other.into()).is_err());
    let journal = Journal::new().unwrap();
    journal.word(1).store(LAYOUT + (1 << 48), Ordering::Relaxed);
    assert!(Journal::left(journal.as_fd().try_clone_to_owned().unwrap()).is_err());
}

#[derive(Clone, Debug)]
enum Event {
    Taken {
        which: usize,
        name: u8,
    },
    /// One of those that wait.
    Answered(usize),
    Died,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0..3usize, 1..=255u8).prop_map(|(which, name)| Event::Taken { which, name }),
        3 => any::<usize>().prop_map(Event::Answered),
        1 => proptest::strategy::Just(Event::Died),
    ]
}

/// What waits, sorted.
fn expected(waiting: &[(u64, Request, Entry)]) -> Vec<(u64, Vec<u8>)> {
    let mut all: Vec<_> = waiting.iter().map(|(m, r, _)| (*m, r.bytes().to_vec())).collect();
    all.sort();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_happened_what_waits_is_found_and_nothing_else(
        events in proptest::collection::vec(event(), 0..100)
    ) {
        let mut journal = Journal::new().unwrap();
        let recorders = |journal: &Arc<Journal>| -> Vec<(u64, Recorder)> {
            (1..4).map(|mount| (mount, journal.recorder(mount).unwrap())).collect()
        };
        let mut by_mount = recorders(&journal);
        let mut waiting: Vec<(u64, Request, Entry)> = Vec::new();
        for (n, event) in (1..).zip(events.into_iter().chain([Event::Died])) {
            match event {
                Event::Taken { which, name } => {
                    let (mount, recorder) = &by_mount[which];
                    let request = lookup(2 * n, &vec![name; usize::from(name)]);
                    let entry = recorder.record(&request).unwrap();
                    waiting.push((*mount, request, entry));
                }
                Event::Answered(which) if !waiting.is_empty() => {
                    waiting.swap_remove(which % waiting.len());
                }
                Event::Answered(_) => {}
                Event::Died => {
                    let (next, left) = died(&journal);
                    let all = left.into_iter().flat_map(|(mount, taken)| {
                        taken.requests.into_iter().map(move |(r, entry)| (mount, r, entry))
                    });
                    let found: Vec<_> = all.collect();
                    prop_assert_eq!(expected(&found), expected(&waiting));
                    waiting = found;
                    by_mount = recorders(&next);
                    journal = next;
                }
            }
        }
    }

    #[test]
    fn whatever_was_left_nothing_panics(
        words in proptest::collection::vec((2..WORDS, any::<u64>()), 0..200),
        slots in proptest::collection::vec((0..SLOTS, any::<u64>(), 0..64u32, 0..400u32), 0..50)
    ) {
        let journal = Journal::new().unwrap();
        let put = |word: usize, value: u64| {
            journal.file.write_all_at(&value.to_ne_bytes(), (word * WORD_BYTES) as u64).unwrap();
        };
        words.into_iter().for_each(|(word, value)| put(word, value));
        for (slot, mount, code, len) in slots {
            let at = FIRST_SLOT + slot * SLOT_WORDS;
            put(at, mount);
            put(at + 1, u64::from(code) << 32 | u64::from(len));
        }
        let (next, left) = died(&journal);
        drop(left);
        prop_assert_eq!(next.free().slots.len(), SLOTS);
        prop_assert_eq!(next.free().pages.len(), PAGES);
    }
}
