//! N:M masks: of every `group` consecutive columns exactly `keep` stay.

use rayon::prelude::*;

use crate::error::{CoreError, Result};
use crate::select::streaming::Cost;
use crate::units::Kind;

/// How many of how many stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    keep: usize,
    group: usize,
}

impl Pattern {
    /// `keep` of every `group` stay.
    ///
    /// # Errors
    /// [`CoreError::Argument`] unless `1 <= keep < group`.
    pub fn new(keep: u64, group: u64) -> Result<Self> {
        let pattern = || Some((usize::try_from(keep).ok()?, usize::try_from(group).ok()?));
        match pattern() {
            Some((keep, group)) if (1..group).contains(&keep) => Ok(Self { keep, group }),
            _ => Err(CoreError::Argument(format!(
                "{keep} of {group} cannot be kept: at least 1 and fewer than all must be"
            ))),
        }
    }
}

/// Elements that one task masks.
const TASK: usize = if cfg!(test) { 64 } else { 1 << 16 };

/// Largest group whose members are ranked by comparing all pairs.
const PAIRWISE: usize = 32;

/// Keep mask of a matrix of `columns` columns, row-major, of which the first `pruned` are cut
/// into groups from column 0 on; the rest stays.
///
/// The largest costs of a group stay, among equal ones the lower index goes first. A last group
/// of fewer than `group` columns keeps at most `keep`. O(n log group), in parallel.
///
/// # Errors
/// [`CoreError::Argument`] if `pruned` exceeds `columns` or the costs are no whole rows,
/// [`CoreError::NonFinite`] (layer 0, row-major index) for the first cost within the pruned
/// columns that is NaN or infinite, [`CoreError::Memory`] if there is none for the mask.
///
/// ```
/// use _core::nm::{Pattern, nm_mask};
///
/// let mask = nm_mask(&[4.0, 1.0, 3.0, 3.0, 9.0], 5, 4, Pattern::new(2, 4)?)?;
/// assert_eq!(mask, [true, false, false, true, true]);
/// # Ok::<(), _core::CoreError>(())
/// ```
pub fn nm_mask<T: Cost>(
    costs: &[T],
    columns: usize,
    pruned: usize,
    pattern: Pattern,
) -> Result<Vec<bool>> {
    if pruned > columns {
        return Err(CoreError::Argument(format!(
            "{pruned} columns cannot be pruned: the matrix has {columns}"
        )));
    }
    if !costs.len().is_multiple_of(columns.max(1)) || (columns == 0 && !costs.is_empty()) {
        return Err(CoreError::Argument(format!(
            "{} costs are no whole rows of {columns} columns",
            costs.len()
        )));
    }
    let mut keep = Vec::new();
    keep.try_reserve_exact(costs.len()).map_err(|_| CoreError::Memory("the mask"))?;
    keep.resize(costs.len(), true);
    if pruned == 0 {
        return Ok(keep);
    }
    let task = (TASK / columns).max(1) * columns;
    let finite = keep
        .par_chunks_mut(task)
        .zip(costs.par_chunks(task))
        .map(|(keep, costs)| {
            let rows = keep.chunks_mut(columns).zip(costs.chunks(columns));
            let mut scratch = Vec::new();
            rows.fold(true, |finite, (keep, costs)| {
                finite & mask_row(&costs[..pruned], &mut keep[..pruned], pattern, &mut scratch)
            })
        })
        .reduce(|| true, |a, b| a & b);
    if finite {
        return Ok(keep);
    }
    let bad = costs.iter().enumerate().find(|(i, cost)| i % columns < pruned && !cost.finite());
    match bad {
        None => Ok(keep),
        Some((index, cost)) => {
            let (kind, value) = (Kind::Element, cost.widen());
            Err(CoreError::NonFinite { layer: 0, kind, index, value })
        }
    }
}

/// Masks one row. False if a cost is NaN or infinite.
fn mask_row<T: Cost>(
    costs: &[T],
    keep: &mut [bool],
    pattern: Pattern,
    scratch: &mut Vec<usize>,
) -> bool {
    match pattern.group {
        2 => mask_groups::<T, 2, 1>(costs, keep, pattern.keep),
        4 => mask_groups::<T, 4, 1>(costs, keep, pattern.keep),
        8 => mask_groups::<T, 8, 1>(costs, keep, pattern.keep),
        16 => mask_groups::<T, 16, 8>(costs, keep, pattern.keep),
        group => {
            let groups = costs.chunks(group).zip(keep.chunks_mut(group));
            groups.for_each(|(costs, keep)| mask_any(costs, keep, pattern.keep, scratch));
        }
    }
    costs.iter().fold(true, |finite, cost| finite & cost.finite())
}

/// Groups of a length `M` known to the compiler, `B` of them at a time.
///
/// A cost stays if fewer than `kept` of its group beat it. Every pair is compared once: of two
/// costs exactly one beats the other, the later one if they are equal.
fn mask_groups<T: Cost, const M: usize, const B: usize>(
    costs: &[T],
    keep: &mut [bool],
    kept: usize,
) {
    #[allow(clippy::cast_possible_wrap)]
    let fewer = kept as i32;
    let blocks = costs.as_chunks::<M>().0.as_chunks::<B>().0;
    let done = M * B * blocks.len();
    let keep_blocks = keep.as_chunks_mut::<M>().0.as_chunks_mut::<B>().0;
    for (costs, keep) in blocks.iter().zip(keep_blocks) {
        let mut beaten_by = [[0_i32; B]; M];
        for i in 0..M {
            for j in i + 1..M {
                for b in 0..B {
                    let later = i32::from(costs[b][j] >= costs[b][i]);
                    beaten_by[i][b] += later;
                    beaten_by[j][b] += 1 - later;
                }
            }
        }
        for i in 0..M {
            for b in 0..B {
                keep[b][i] = beaten_by[i][b] < fewer;
            }
        }
    }
    let tail = costs[done..].chunks(M).zip(keep[done..].chunks_mut(M));
    tail.for_each(|(costs, keep)| mask_any(costs, keep, kept, &mut Vec::new()));
}

/// One group of any length.
fn mask_any<T: Cost>(costs: &[T], keep: &mut [bool], kept: usize, scratch: &mut Vec<usize>) {
    if costs.len() <= kept {
        return;
    }
    if costs.len() <= PAIRWISE {
        for (i, keep) in keep.iter_mut().enumerate() {
            let ahead = costs[..i].iter().filter(|&&other| other > costs[i]).count();
            let behind = costs[i + 1..].iter().filter(|&&other| other >= costs[i]).count();
            *keep = ahead + behind < kept;
        }
        return;
    }
    scratch.clear();
    scratch.extend(0..costs.len());
    let goes = costs.len() - kept;
    scratch.select_nth_unstable_by_key(goes - 1, |&i| (costs[i].key(), i));
    scratch[..goes].iter().for_each(|&i| keep[i] = false);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{cost, on_threads};

    /// Sorts each group by (cost, index).
    fn slow(costs: &[f64], columns: usize, pruned: usize, keep: usize, group: usize) -> Vec<bool> {
        let mut mask = vec![true; costs.len()];
        for start in (0..costs.len()).step_by(columns.max(1)) {
            for first in (0..pruned).step_by(group) {
                let mut order: Vec<usize> =
                    (start + first..start + pruned.min(first + group)).collect();
                order.sort_by(|&a, &b| costs[a].partial_cmp(&costs[b]).unwrap().then(a.cmp(&b)));
                let goes = order.len().saturating_sub(keep);
                order[..goes].iter().for_each(|&i| mask[i] = false);
            }
        }
        mask
    }

    proptest! {
        #[test]
        fn equals_a_sort_of_each_group(
            rows in 0_usize..6,
            columns in 0_usize..90,
            rest in 0_usize..3,
            group in prop_oneof![Just(2_usize), Just(4), Just(8), Just(16), 2_usize..80],
            keep in any::<prop::sample::Index>(),
            pool in prop::collection::vec(cost(), 540),
        ) {
            let keep = 1 + keep.index(group - 1);
            let costs = &pool[..rows * columns];
            let pruned = columns.saturating_sub(rest);
            let pattern = Pattern::new(keep as u64, group as u64).unwrap();
            let expected = slow(costs, columns, pruned, keep, group);
            prop_assert_eq!(on_threads(|| nm_mask(costs, columns, pruned, pattern)), Ok(expected));
            #[allow(clippy::cast_possible_truncation)]
            let costs: Vec<f32> = costs.iter().map(|&cost| (cost as f32).min(f32::MAX)).collect();
            let long: Vec<f64> = costs.iter().map(|&cost| f64::from(cost)).collect();
            let expected = slow(&long, columns, pruned, keep, group);
            prop_assert_eq!(on_threads(|| nm_mask(&costs, columns, pruned, pattern)), Ok(expected));
        }

        #[test]
        fn names_the_first_cost_that_is_not_finite(
            bad in prop::collection::vec(0_usize..50 * 9, 1..5),
            value in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        ) {
            let mut costs = vec![1.0_f32; 50 * 9];
            for &i in &bad {
                costs[i] = value;
            }
            let found = nm_mask(&costs, 9, 8, Pattern::new(2, 4).unwrap());
            match bad.iter().filter(|&i| i % 9 != 8).min() {
                None => prop_assert!(found.is_ok()),
                Some(&first) => {
                    let refused = matches!(found, Err(CoreError::NonFinite { index, layer: 0, .. }) if index == first);
                    prop_assert!(refused);
                }
            }
        }
    }

    #[test]
    fn senseless_patterns_and_shapes_are_refused() {
        for (keep, group) in [(0, 4), (4, 4), (5, 4), (0, 0), (1, 1)] {
            assert!(matches!(Pattern::new(keep, group), Err(CoreError::Argument(_))));
        }
        let pattern = Pattern::new(2, 4).unwrap();
        assert!(matches!(nm_mask(&[0.0; 8], 4, 5, pattern), Err(CoreError::Argument(_))));
        assert!(matches!(nm_mask(&[0.0; 8], 3, 3, pattern), Err(CoreError::Argument(_))));
        assert!(matches!(nm_mask(&[0.0; 8], 0, 0, pattern), Err(CoreError::Argument(_))));
    }
}
