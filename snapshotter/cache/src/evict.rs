//! What to evict: the policy alone. Candidates in, victims out.
//!
//! Order: whole compressed blobs (their layers are decoded; they only serve peers), then partial
//! ones, then the data of layers, then chunks that nobody reads of layers in use, then the layers'
//! small objects; within each the least recently used first. What is in use is never a victim.

use std::time::SystemTime;

use skimmer_proto::Digest;

/// After an eviction this share of the quota is in use, so that not every write evicts.
const LOW_WATER_PERCENT: u64 = 90;

/// Something that can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub what: What,
    /// The digest of the blob, or of the layer's blob.
    pub digest: Digest,
    pub bytes: u64,
    pub last_use: SystemTime,
    pub in_use: bool,
}

/// In the order of eviction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    WholeBlob,
    PartialBlob,
    /// The data file of a layer, with its bitmap.
    Data,
    /// Of the data file of a layer in use, chunks that nobody reads. Goes in part.
    Chunks,
    /// Index, piece table and inodes of a layer.
    Objects,
}

impl What {
    pub const fn name(self) -> &'static str {
        match self {
            Self::WholeBlob | Self::PartialBlob => "blob",
            Self::Data => "data",
            Self::Chunks => "chunks",
            Self::Objects => "objects",
        }
    }
}

/// How many bytes must go now.
pub const fn excess(used: u64, quota: u64) -> u64 {
    let low = quota / 100 * LOW_WATER_PERCENT;
    if used > quota { used - low } else { 0 }
}

/// What goes, in this order, so that `excess` bytes are freed, or all that can be.
pub fn victims(mut candidates: Vec<Candidate>, excess: u64) -> Vec<Candidate> {
    candidates.retain(|candidate| !candidate.in_use && candidate.bytes > 0);
    candidates.sort_unstable_by_key(|c| (c.what, c.last_use, c.digest));
    let mut left = excess;
    candidates.retain_mut(|candidate| {
        let wanted = left > 0;
        if candidate.what == What::Chunks {
            candidate.bytes = candidate.bytes.min(left);
        }
        left = left.saturating_sub(candidate.bytes);
        wanted
    });
    candidates
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    fn candidate((what, bytes, age, in_use): (u8, u32, u16, bool)) -> Candidate {
        let all = [What::WholeBlob, What::PartialBlob, What::Data, What::Chunks, What::Objects];
        Candidate {
            what: all[usize::from(what % 5)],
            digest: Digest::of(&[what]),
            bytes: u64::from(bytes),
            last_use: SystemTime::UNIX_EPOCH + Duration::from_secs(u64::from(age)),
            in_use,
        }
    }

    #[test]
    fn order() {
        let row = |what, age, in_use| Candidate {
            what,
            digest: Digest::of(&[age]),
            bytes: 10,
            last_use: SystemTime::UNIX_EPOCH + Duration::from_secs(age.into()),
            in_use,
        };
        let all = vec![
            row(What::Objects, 0, false),
            row(What::Chunks, 7, false),
            row(What::Data, 1, false),
            row(What::Data, 2, true),
            row(What::WholeBlob, 9, false),
            row(What::WholeBlob, 3, true),
            row(What::PartialBlob, 4, false),
            row(What::WholeBlob, 8, false),
        ];
        for (excess, expected) in [
            (0, vec![]),
            (1, vec![8]),
            (10, vec![8]),
            (11, vec![8, 9]),
            (25, vec![8, 9, 4]),
            (31, vec![8, 9, 4, 1]),
            (41, vec![8, 9, 4, 1, 7]),
            (u64::MAX, vec![8, 9, 4, 1, 7, 0]),
        ] {
            let expected: Vec<_> = expected.into_iter().map(|age| Digest::of(&[age])).collect();
            let chosen: Vec<_> = victims(all.clone(), excess).iter().map(|c| c.digest).collect();
            assert_eq!(chosen, expected, "{excess}");
        }
    }

    #[test]
    fn hysteresis() {
        for (used, quota, expected) in
            [(0, 0, 0), (1000, 1000, 0), (1001, 1000, 101), (2000, 1000, 1100), (5, 0, 5)]
        {
            assert_eq!(excess(used, quota), expected, "{used} of {quota}");
        }
    }

    #[test]
    fn chunks_go_in_part() {
        let what = What::Chunks;
        let last_use = SystemTime::UNIX_EPOCH;
        let row = Candidate { what, digest: Digest::of(b""), bytes: 100, last_use, in_use: false };
        let bytes = |excess| -> u64 { victims(vec![row; 2], excess).iter().map(|c| c.bytes).sum() };
        assert_eq!([0, 30, 130, 500].map(bytes), [0, 30, 130, 200]);
    }

    proptest! {
        #[test]
        fn frees_enough_but_no_more_and_never_what_is_in_use(
            rows in any::<Vec<(u8, u32, u16, bool)>>(), excess in any::<u32>()
        ) {
            let all: Vec<_> = rows.into_iter().map(candidate).collect();
            let free: u64 = all.iter().filter(|c| !c.in_use).map(|c| c.bytes).sum();
            let chosen = victims(all, excess.into());
            prop_assert!(chosen.iter().all(|c| !c.in_use));
            let freed: u64 = chosen.iter().map(|c| c.bytes).sum();
            prop_assert!(freed >= free.min(excess.into()));
            if let Some((_, before_last)) = chosen.split_last() {
                prop_assert!(before_last.iter().map(|c| c.bytes).sum::<u64>() < u64::from(excess));
            } else {
                prop_assert_eq!(free.min(excess.into()), 0);
            }
        }
    }
}
