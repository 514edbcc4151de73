//! The exact quantile of a stream of costs that never lies in memory as a whole.
//!
//! Single weights can be billions. Their costs are streamed layer by layer, several times: the
//! first pass counts how many costs start with each 16-bit digit, which tells the digit that the
//! wanted cost starts with; the next pass counts the second digits of the costs that start so,
//! and so on. As soon as few enough costs are left in question they are collected instead.
//! Nothing is sorted or concatenated.

mod digits;
mod mask;
mod open;
mod tables;

use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use self::digits::{DIGIT_BITS, finite_digits};
use self::open::Open;
use self::tables::{CHUNK, Tables};
use crate::error::{CoreError, Result};
use crate::units::{Kind, expect_length};

pub use self::digits::Cost;
pub use self::mask::element_mask;

/// Up to how many costs in question are collected rather than counted.
const FEW: u64 = if cfg!(test) { 20 } else { 1 << 19 };

/// Where a stream of costs is cut so that exactly `below + ties` elements go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// The largest cost that goes; `-inf` if none does.
    pub cost: f64,
    /// Number of elements strictly below `cost`; all of them go.
    pub below: u64,
    /// How many of the elements equal to `cost` go, the first ones in the order of layer and index.
    pub ties: u64,
    /// Number of alive elements seen.
    pub count: u64,
}

/// Finds the `rank`-th smallest cost in a few passes over the stream.
///
/// Feed every layer to [`update`](Self::update), then call [`finish_pass`](Self::finish_pass), and
/// start over until it returns true: twice for `f32`, two to four times for `f64`. Memory: half a
/// megabyte a thread and at most 5 MB beside, whatever the length of the stream.
///
/// An error in either call drops the pass under way; it can be fed again from its first layer.
///
/// ```
/// use _core::select::streaming::CostQuantile;
///
/// let layers = [vec![0.5_f32, 4.0, 1.0], vec![1.0, 3.0]];
/// let mut quantile = CostQuantile::new(2);
/// loop {
///     for (layer, costs) in layers.iter().enumerate() {
///         quantile.update(layer, costs, None)?;
///     }
///     if quantile.finish_pass()? {
///         break;
///     }
/// }
/// let threshold = quantile.result().unwrap();
/// assert_eq!((threshold.cost, threshold.below, threshold.ties), (1.0, 1, 1));
/// # Ok::<(), _core::CoreError>(())
/// ```
#[derive(Default)]
pub struct CostQuantile {
    rank: u64,
    passes: u64,
    /// Name and number of digits of the costs' type, known from the first layer on.
    dtype: Option<(&'static str, u32)>,
    /// Elements of every pass, known after the first.
    count: Option<u64>,
    /// Elements of the current pass.
    seen: u64,
    open: Open,
    tables: Tables,
    collected: Mutex<Vec<u64>>,
    result: Option<Threshold>,
}

impl CostQuantile {
    /// A search for the `rank`-th smallest cost, counted from 1; rank 0 means that nothing goes.
    #[must_use]
    pub fn new(rank: u64) -> Self {
        Self { rank, ..Self::default() }
    }

    /// Passes finished so far.
    #[must_use]
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// The threshold, once it is known.
    #[must_use]
    pub fn result(&self) -> Option<Threshold> {
        self.result
    }

    /// Feeds one layer's costs in the current pass. O(n), in parallel.
    ///
    /// `alive` says which elements count; `layer` is used in error messages only.
    ///
    /// # Errors
    /// [`CoreError::NonFinite`] for the first alive cost that is NaN or infinite,
    /// [`CoreError::Length`] if the mask does not fit, [`CoreError::Argument`] if the costs are of
    /// another type than before or the threshold is known already.
    pub fn update<T: Cost>(
        &mut self,
        layer: usize,
        costs: &[T],
        alive: Option<&[bool]>,
    ) -> Result<()> {
        let outcome = self.try_update(layer, costs, alive);
        if outcome.is_err() {
            self.drop_pass();
        }
        outcome
    }

    fn try_update<T: Cost>(
        &mut self,
        layer: usize,
        costs: &[T],
        alive: Option<&[bool]>,
    ) -> Result<()> {
        if self.result.is_some() {
            return Err(CoreError::Argument("the threshold is known: no more costs fit in".into()));
        }
        let (name, _) = *self.dtype.get_or_insert((T::NAME, T::DIGITS));
        if name != T::NAME {
            return Err(CoreError::Argument(format!(
                "layer {layer}: costs are {}, those before were {name}",
                T::NAME
            )));
        }
        if let Some(alive) = alive {
            expect_length(layer, "alive", costs.len(), alive.len())?;
        }
        let chunks = costs.len().div_ceil(CHUNK);
        let chunk = |chunk: usize| {
            let range = chunk * CHUNK..costs.len().min((chunk + 1) * CHUNK);
            (&costs[range.clone()], alive.map(|alive| &alive[range]))
        };
        let finite = if chunks <= 1 {
            (0..chunks).all(|i| self.count_chunk(chunk(i)))
        } else {
            (0..chunks).into_par_iter().map(|i| self.count_chunk(chunk(i))).all(|finite| finite)
        };
        if !finite || (self.open.digits == 0 && self.tables.any_outside(&finite_digits::<T>())) {
            refuse_non_finite(layer, costs, alive)?;
        }
        self.seen += alive
            .map_or(costs.len() as u64, |alive| alive.iter().map(|&alive| u64::from(alive)).sum());
        Ok(())
    }

    /// Counts or collects one chunk. False if something alive in it is not finite, except in the
    /// first pass, whose tables tell that by themselves.
    fn count_chunk<T: Cost>(&self, (costs, alive): (&[T], Option<&[bool]>)) -> bool {
        let open = self.open;
        let finite = if open.digits == 0 {
            self.tables.with(costs.len(), |table| table.count_first(costs, alive));
            true
        } else if open.count <= FEW {
            let mut found = Vec::new();
            let finite = open.each_match(costs, alive, |key, hit, _| {
                if hit {
                    found.push(key);
                }
            });
            if !found.is_empty() {
                let mut collected = self.lock_collected();
                // A stream that changed between the passes must not fill the memory.
                let room = (open.count as usize + 1).saturating_sub(collected.len());
                found.truncate(room);
                collected.append(&mut found);
            }
            finite
        } else {
            let shift = 64 - DIGIT_BITS * (open.digits + 1);
            self.tables.with(costs.len(), |table| {
                open.each_match(costs, alive, |key, hit, place| {
                    table.count((key >> shift) as u16, hit, place);
                })
            })
        };
        finite || first_non_finite(costs, alive).is_none()
    }

    /// Ends the current pass; true when the threshold is known.
    ///
    /// # Errors
    /// [`CoreError::Target`] if the rank exceeds the number of elements, [`CoreError::Argument`] if
    /// this pass did not stream what the first one did.
    pub fn finish_pass(&mut self) -> Result<bool> {
        if self.result.is_some() {
            return Ok(true);
        }
        let outcome = self.try_finish();
        self.drop_pass();
        if outcome.is_ok() {
            self.passes += 1;
        }
        outcome.map(|()| self.result.is_some())
    }

    fn try_finish(&mut self) -> Result<()> {
        let count = self.count.unwrap_or(self.seen);
        if self.seen != count {
            return Err(CoreError::Argument(format!(
                "this pass streamed {} elements, the first one {count}",
                self.seen
            )));
        }
        if self.rank > count {
            return Err(CoreError::Target { requested: self.rank, available: count });
        }
        if self.rank == 0 {
            self.result = Some(Threshold { cost: f64::NEG_INFINITY, below: 0, ties: 0, count });
            return Ok(());
        }
        let before = if self.open.digits == 0 { count } else { self.open.count };
        let changed = || CoreError::Argument("the costs changed between two passes".into());
        let wanted = self.rank - self.open.below;
        let (_, digits) = self.dtype.unwrap_or_default();
        if self.open.digits > 0 && self.open.count <= FEW {
            let mut keys = std::mem::take(&mut *self.lock_collected());
            if keys.len() as u64 != before {
                return Err(changed());
            }
            let (_, &mut key, _) = keys.select_nth_unstable(wanted as usize - 1);
            let below = keys.iter().filter(|&&other| other < key).count() as u64;
            self.settle(key, self.open.below + below, count);
            return Ok(());
        }
        let histogram = self.tables.drain();
        if histogram.iter().sum::<u64>() != before {
            return Err(changed());
        }
        let mut below = 0;
        let mut digit = 0;
        while below + histogram[digit] < wanted {
            below += histogram[digit];
            digit += 1;
        }
        self.count = Some(count);
        self.open = Open {
            prefix: self.open.prefix << DIGIT_BITS | digit as u64,
            digits: self.open.digits + 1,
            count: histogram[digit],
            below: self.open.below + below,
        };
        if self.open.digits == digits {
            let key = self.open.prefix << (64 - DIGIT_BITS * digits);
            self.settle(key, self.open.below, count);
        }
        Ok(())
    }

    fn settle(&mut self, key: u64, below: u64, count: u64) {
        // The type is known: a rank above 0 was reached by elements.
        let is_short = self.dtype.is_some_and(|(name, _)| name == f32::NAME);
        let cost = if is_short { f32::of_key(key).widen() } else { f64::of_key(key) };
        self.result = Some(Threshold { cost, below, ties: self.rank - below, count });
    }

    fn lock_collected(&self) -> MutexGuard<'_, Vec<u64>> {
        self.collected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_pass(&mut self) {
        self.seen = 0;
        self.lock_collected().clear();
        self.tables.drain();
        if self.count.is_none() && self.result.is_none() {
            self.dtype = None;
        }
    }
}

/// The first alive cost that is NaN or infinite.
fn first_non_finite<T: Cost>(costs: &[T], alive: Option<&[bool]>) -> Option<usize> {
    let alive = |index: usize| alive.is_none_or(|alive| alive[index]);
    costs.iter().enumerate().position(|(index, cost)| !cost.finite() && alive(index))
}

/// An error for the first alive cost that is NaN or infinite, if there is one.
fn refuse_non_finite<T: Cost>(layer: usize, costs: &[T], alive: Option<&[bool]>) -> Result<()> {
    match first_non_finite(costs, alive) {
        None => Ok(()),
        Some(index) => {
            let (kind, value) = (Kind::Element, costs[index].widen());
            Err(CoreError::NonFinite { layer, kind, index, value })
        }
    }
}

#[cfg(test)]
mod tests;
