//! Histograms of digits, counted by many threads.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::digits::{Cost, DIGIT_VALUES};

/// Elements that one task counts.
pub(super) const CHUNK: usize = if cfg!(test) { 64 } else { 1 << 17 };

/// Elements after which a table's 32-bit counters are emptied into 64-bit ones.
const FULL: u64 = if cfg!(test) { 1 << 10 } else { u32::MAX as u64 };

/// Costs whose digits are computed before any is counted.
const BLOCK: usize = 128;

type Counters = [u32; DIGIT_VALUES];

/// One thread's counters. Two lanes take turns: equal digits in a row would otherwise wait for
/// each other's store.
pub(super) struct Table {
    lanes: [Box<Counters>; 2],
    pending: u64,
}

impl Table {
    fn new() -> Self {
        // Built on the heap: the stack of a worker may be smaller than a lane.
        let lane = || match vec![0; DIGIT_VALUES].into_boxed_slice().try_into() {
            Ok(lane) => lane,
            Err(_) => unreachable!("the length is the array's"),
        };
        Self { lanes: [lane(), lane()], pending: 0 }
    }

    /// Counts the first digit of every alive cost.
    pub(super) fn count_first<T: Cost>(&mut self, costs: &[T], alive: Option<&[bool]>) {
        let (blocks, rest) = costs.as_chunks::<BLOCK>();
        let Some(alive) = alive else {
            for costs in blocks {
                self.count_block(costs, &[true; BLOCK]);
            }
            for cost in rest {
                self.count(cost.first_digit(), true, 0);
            }
            return;
        };
        let (alive_blocks, alive_rest) = alive.as_chunks::<BLOCK>();
        for (costs, alive) in blocks.iter().zip(alive_blocks) {
            self.count_block(costs, alive);
        }
        for (cost, &alive) in rest.iter().zip(alive_rest) {
            self.count(cost.first_digit(), alive, 0);
        }
    }

    /// The digits of a block are computed in vector registers, so all of them go to the memory
    /// before the first one is read back.
    #[inline]
    fn count_block<T: Cost>(&mut self, costs: &[T; BLOCK], alive: &[bool; BLOCK]) {
        let digits = costs.map(T::first_digit);
        let [even, odd] = &mut self.lanes;
        let pairs = digits.as_chunks::<2>().0.iter().zip(alive.as_chunks::<2>().0);
        for (&[a, b], &[alive_a, alive_b]) in pairs {
            even[usize::from(a)] += u32::from(alive_a);
            odd[usize::from(b)] += u32::from(alive_b);
        }
    }

    /// Counts one digit if `hit`, without a branch; `place` picks the lane.
    #[inline]
    pub(super) fn count(&mut self, digit: u16, hit: bool, place: usize) {
        self.lanes[place & 1][usize::from(digit)] += u32::from(hit);
    }

    fn drain_into(&mut self, totals: &mut [u64]) {
        let [even, odd] = &mut self.lanes;
        for ((total, even), odd) in totals.iter_mut().zip(even.iter_mut()).zip(odd.iter_mut()) {
            *total += u64::from(std::mem::take(even)) + u64::from(std::mem::take(odd));
        }
        self.pending = 0;
    }
}

/// The tables of all threads: a task takes one, counts a chunk and gives it back.
#[derive(Default)]
pub(super) struct Tables {
    idle: Mutex<Vec<Table>>,
    /// What full tables held; empty as long as none was.
    totals: Mutex<Vec<u64>>,
}

impl Tables {
    /// Lets `work` count at most `elements` (at most [`CHUNK`]) in a table of its own.
    pub(super) fn with<R>(&self, elements: usize, work: impl FnOnce(&mut Table) -> R) -> R {
        let mut table = lock(&self.idle).pop().unwrap_or_else(Table::new);
        if table.pending + elements as u64 > FULL {
            let mut totals = lock(&self.totals);
            totals.resize(DIGIT_VALUES, 0);
            table.drain_into(&mut totals);
        }
        table.pending += elements as u64;
        let result = work(&mut table);
        lock(&self.idle).push(table);
        result
    }

    /// Whether any digit outside of `range` was counted.
    pub(super) fn any_outside(&self, range: &std::ops::RangeInclusive<u16>) -> bool {
        let (low, high) = (usize::from(*range.start()), usize::from(*range.end()));
        let outside = |lane: &Counters| lane[..low].iter().chain(&lane[high + 1..]).any(|&n| n > 0);
        let full = lock(&self.totals);
        lock(&self.idle).iter().flat_map(|table| &table.lanes).any(|lane| outside(lane))
            || (!full.is_empty()
                && full[..low].iter().chain(&full[high + 1..]).any(|&count| count > 0))
    }

    /// The histogram of everything counted; the tables are empty afterwards.
    pub(super) fn drain(&mut self) -> Vec<u64> {
        let mut totals = std::mem::take(&mut *lock(&self.totals));
        totals.resize(DIGIT_VALUES, 0);
        for table in lock(&self.idle).iter_mut() {
            table.drain_into(&mut totals);
        }
        totals
    }
}

/// A panicking task leaves counters that the caller drops, so a poisoned lock is no harm.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
