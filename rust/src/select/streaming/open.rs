//! The costs among which the wanted one is still to be found.

use super::digits::{Cost, DIGIT_BITS};

/// The costs in question: those whose key starts with `prefix`.
#[derive(Default, Clone, Copy)]
pub(super) struct Open {
    /// The digits that are known, the last one in the lowest bits.
    pub(super) prefix: u64,
    /// How many digits are known.
    pub(super) digits: u32,
    /// Number of costs in question.
    pub(super) count: u64,
    /// Number of costs below them.
    pub(super) below: u64,
}

impl Open {
    /// Calls `found` with the key of every cost that may be in question, whether it is one and is
    /// alive, and a place that differs between neighbours. False if some cost, alive or not, is
    /// NaN or infinite.
    #[inline]
    pub(super) fn each_match<T: Cost>(
        &self,
        costs: &[T],
        alive: Option<&[bool]>,
        mut found: impl FnMut(u64, bool, usize),
    ) -> bool {
        const BLOCK: usize = 16;
        let shift = 64 - DIGIT_BITS * self.digits;
        let (low, high) = (T::of_key(self.prefix << shift), T::of_key(!(!self.prefix << shift)));
        let mut all_finite = true;
        for (block, costs) in costs.chunks(BLOCK).enumerate() {
            // A wide net first, in floating point, where the two zeros are one.
            let (mut hits, mut finite) = (0_u32, true);
            for &cost in costs {
                hits += u32::from((cost >= low) & (cost <= high));
                finite &= cost.finite();
            }
            all_finite &= finite;
            if hits == 0 {
                continue;
            }
            for (offset, cost) in costs.iter().enumerate() {
                let key = cost.key();
                let alive = alive.is_none_or(|alive| alive[block * BLOCK + offset]);
                found(key, (key >> shift == self.prefix) & alive, offset);
            }
        }
        all_finite
    }
}
