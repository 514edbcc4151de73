//! Where in the order a growing count reaches its target, without sorting.
//!
//! A weighted quickselect over many groups at once: each round splits every group's open range at
//! a common pivot, counts what would be removed if all below the pivot went, and keeps the side
//! on which the target lies. The count may be any monotone function of the groups' weights, so
//! overlapping rows and columns are no harder than independent units.

use rayon::prelude::*;

/// A candidate as the search sees it.
pub(super) trait Record: Copy + Send + Sync {
    /// Its cost, mapped by [`crate::units::order_key`].
    fn key(self) -> u64;
    /// What it adds to its group's weight.
    fn weight(self) -> u64;
}

/// Rows and columns: the weight is their number, so the key is all there is.
impl Record for u64 {
    fn key(self) -> u64 {
        self
    }
    fn weight(self) -> u64 {
        1
    }
}

/// A unit with a size of its own.
#[derive(Clone, Copy)]
pub(super) struct Sized {
    pub(super) key: u64,
    pub(super) size: u64,
}

impl Record for Sized {
    fn key(self) -> u64 {
        self.key
    }
    fn weight(self) -> u64 {
        self.size
    }
}

/// The candidates of one layer and kind. `records[..low]` go, `records[high..]` stay, between
/// them it is open.
pub(super) struct Group<T> {
    records: Vec<T>,
    low: usize,
    high: usize,
    /// Weight of `records[..low]`.
    below: u64,
}

/// Result of one split of a group: records and weight of its open range below the pivot.
#[derive(Clone, Copy)]
struct Split {
    length: usize,
    weight: u64,
}

impl<T: Record> Group<T> {
    pub(super) fn new(records: Vec<T>) -> Self {
        let high = records.len();
        Self { records, low: 0, high, below: 0 }
    }

    /// Weight of all candidates; `None` if it does not fit 64 bits.
    pub(super) fn weight(&self) -> Option<u64> {
        self.records.iter().map(|record| record.weight()).try_fold(0, u64::checked_add)
    }

    /// Number of candidates.
    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    fn open(&self) -> &[T] {
        &self.records[self.low..self.high]
    }

    /// Moves the open records with a key below `bound` to the front of the open range.
    fn split(&mut self, bound: u64) -> Split {
        let open = &mut self.records[self.low..self.high];
        let mut length = 0;
        let mut weight = 0;
        for index in 0..open.len() {
            // Branch-free: what lies between `length` and `index` is never below the bound, so
            // the exchange is harmless where the record is not either.
            let record = open[index];
            let below = record.key() < bound;
            open.swap(index, length);
            length += usize::from(below);
            weight += if below { record.weight() } else { 0 };
        }
        Split { length, weight }
    }

    fn raise(&mut self, split: Split) {
        self.low += split.length;
        self.below += split.weight;
    }
}

/// Where the target is reached.
pub(super) struct Crossing {
    /// Key of the last candidate that goes. All with smaller keys go, and some with this one.
    pub(super) key: u64,
    /// Weight of each group's candidates with smaller keys.
    pub(super) below: Vec<u64>,
    /// Number of each group's candidates with smaller keys.
    pub(super) count: Vec<usize>,
    /// Number of each group's candidates with exactly this key.
    pub(super) ties: Vec<usize>,
}

/// Rounds with sampled pivots before pivots halve the interval of keys instead, which bounds the
/// worst case.
const SAMPLED_ROUNDS: u64 = 64;
const SAMPLES: usize = 255;
/// Open candidates that one thread splits alone.
const SERIAL: usize = if cfg!(test) { 16 } else { 1 << 16 };

/// Finds the key at which `removed`, a monotone function of the groups' weights, reaches `target`.
///
/// Needs `removed(nothing) < target <= removed(everything)`. Expected time O(n), memory O(groups)
/// beyond the records, which it reorders.
pub(super) fn crossing<T: Record>(
    groups: &mut [Group<T>],
    target: u64,
    removed: impl Fn(&[u64]) -> u64,
) -> Crossing {
    let reaches = |groups: &[Group<T>], splits: &[Split]| {
        let weights: Vec<u64> =
            groups.iter().zip(splits).map(|(group, split)| group.below + split.weight).collect();
        removed(&weights) >= target
    };
    let mut round = 0;
    loop {
        let pivot = pivot(groups, round);
        round += 1;
        let splits = split_all(groups, pivot);
        if splits.iter().any(|split| split.length > 0) {
            let down = reaches(groups, &splits);
            for (group, split) in groups.iter_mut().zip(splits) {
                if down {
                    group.high = group.low + split.length;
                } else {
                    group.raise(split);
                }
            }
            continue;
        }
        // Nothing open lies below the pivot, so it is the smallest open key: split off its equals.
        let splits = split_all(groups, pivot + 1);
        if reaches(groups, &splits) {
            return Crossing {
                key: pivot,
                below: groups.iter().map(|group| group.below).collect(),
                count: groups.iter().map(|group| group.low).collect(),
                ties: splits.iter().map(|split| split.length).collect(),
            };
        }
        for (group, split) in groups.iter_mut().zip(splits) {
            group.raise(split);
        }
    }
}

fn split_all<T: Record>(groups: &mut [Group<T>], bound: u64) -> Vec<Split> {
    // A few candidates are split sooner than another thread wakes up.
    if groups.iter().map(|group| group.open().len()).sum::<usize>() <= SERIAL {
        return groups.iter_mut().map(|group| group.split(bound)).collect();
    }
    groups.par_iter_mut().map(|group| group.split(bound)).collect()
}

/// An open key: the median of a fixed pseudo-random sample, or after many rounds the middle of
/// the open interval. At least one key is open, or the caller broke the contract.
fn pivot<T: Record>(groups: &[Group<T>], round: u64) -> u64 {
    let open: usize = groups.iter().map(|group| group.open().len()).sum();
    assert!(open > 0, "the target lies beyond all candidates");
    if round >= SAMPLED_ROUNDS {
        let keys = || groups.iter().flat_map(Group::open).map(|record| record.key());
        let (low, high) = (keys().min().unwrap_or(0), keys().max().unwrap_or(0));
        return low + (high - low).div_ceil(2);
    }
    let mut places: Vec<usize> = if open <= SAMPLES {
        (0..open).collect()
    } else {
        (0..SAMPLES as u64)
            .map(|i| (splitmix(round * SAMPLES as u64 + i) % open as u64) as usize)
            .collect()
    };
    places.sort_unstable();
    let mut keys = Vec::with_capacity(places.len());
    let mut start = 0;
    let mut places = places.into_iter().peekable();
    for group in groups {
        let records = group.open();
        while let Some(place) = places.next_if(|&place| place < start + records.len()) {
            keys.push(records[place - start].key());
        }
        start += records.len();
    }
    keys.sort_unstable();
    keys[keys.len() / 2]
}

/// Sebastiano Vigna's `SplitMix64`: a fixed sequence, so that no run differs from another.
fn splitmix(state: u64) -> u64 {
    let mut z = state.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn finds_the_weighted_quantile(
            keys in prop::collection::vec(prop::collection::vec((0_u64..40, 0_u64..5), 0..30), 1..6),
            part in 0.0_f64..1.0,
            midpoints in any::<bool>(),
        ) {
            let mut flat: Vec<(u64, u64)> = keys.iter().flatten().copied().collect();
            flat.sort_unstable();
            let total: u64 = flat.iter().map(|&(_, size)| size).sum();
            prop_assume!(total > 0);
            #[allow(clippy::cast_sign_loss, clippy::cast_precision_loss)]
            let target = 1 + ((total - 1) as f64 * part) as u64;
            let mut sum = 0;
            let expected = flat.iter().find(|&&(_, size)| { sum += size; sum >= target }).unwrap().0;
            let mut groups: Vec<Group<Sized>> = keys
                .iter()
                .map(|group| {
                    // Scaled so that halving the interval of keys takes many rounds.
                    let scale = if midpoints { 1 << 40 } else { 1 };
                    Group::new(group.iter().map(|&(key, size)| Sized { key: key * scale, size }).collect())
                })
                .collect();
            let found = crossing(&mut groups, target, |weights| weights.iter().sum());
            let scale = if midpoints { 1 << 40 } else { 1 };
            prop_assert_eq!(found.key, expected * scale);
            for (group, (below, ties)) in keys.iter().zip(found.below.iter().zip(&found.ties)) {
                let weight: u64 = group.iter().filter(|&&(k, _)| k < expected).map(|&(_, s)| s).sum();
                prop_assert_eq!(*below, weight);
                prop_assert_eq!(*ties, group.iter().filter(|&&(k, _)| k == expected).count());
            }
        }
    }

    #[test]
    fn halving_the_interval_also_ends() {
        let groups: Vec<Group<u64>> = vec![Group::new(vec![0, 1, u64::MAX - 1, 7])];
        assert_eq!(pivot(&groups, SAMPLED_ROUNDS), (u64::MAX - 1).div_ceil(2));
        let groups: Vec<Group<u64>> = vec![Group::new(vec![9, 9])];
        assert_eq!(pivot(&groups, SAMPLED_ROUNDS), 9);
    }
}
