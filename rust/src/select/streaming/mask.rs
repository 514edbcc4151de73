//! The keep mask that a threshold makes of one layer.

use rayon::prelude::*;

use super::tables::CHUNK;
use super::{Cost, Threshold, refuse_non_finite};
use crate::error::{CoreError, Result};
use crate::units::expect_length;

/// Keep mask of one layer: what is below the threshold goes, and of what equals it the first
/// `ties_left` in index order. Returns the mask and how many ties are left to go in later layers.
///
/// Call it layer by layer, starting with `threshold.ties`. O(n), in parallel.
///
/// # Errors
/// [`CoreError::NonFinite`] for the first alive cost that is NaN or infinite,
/// [`CoreError::Length`] if the mask does not fit, [`CoreError::Memory`] if the result does not.
pub fn element_mask<T: Cost>(
    layer: usize,
    costs: &[T],
    alive: Option<&[bool]>,
    threshold: &Threshold,
    mut ties_left: u64,
) -> Result<(Vec<bool>, u64)> {
    if let Some(alive) = alive {
        expect_length(layer, "alive", costs.len(), alive.len())?;
    }
    let cut = threshold.cost;
    let mut keep = Vec::new();
    keep.try_reserve_exact(costs.len()).map_err(|_| CoreError::Memory("the mask"))?;
    keep.resize(costs.len(), true);
    if let Some(alive) = alive {
        keep.copy_from_slice(alive);
    }
    // Ties stay at first; how many there are in each chunk says where to go back to.
    let chunks: Vec<(u64, bool)> = keep
        .par_chunks_mut(CHUNK)
        .zip(costs.par_chunks(CHUNK))
        .map(|(keep, costs)| {
            let (mut ties, mut finite) = (0, true);
            for (keep, cost) in keep.iter_mut().zip(costs) {
                ties += u64::from(*keep & (cost.widen() == cut));
                finite &= cost.finite() | !*keep;
                *keep &= cost.widen() >= cut;
            }
            (ties, finite)
        })
        .collect();
    if chunks.iter().any(|&(_, finite)| !finite) {
        refuse_non_finite(layer, costs, alive)?;
    }
    for (chunk, &(ties, _)) in chunks.iter().enumerate() {
        if ties_left == 0 {
            break;
        }
        if ties == 0 {
            continue;
        }
        let range = chunk * CHUNK..costs.len().min((chunk + 1) * CHUNK);
        for (keep, cost) in keep[range.clone()].iter_mut().zip(&costs[range]) {
            if ties_left > 0 && *keep && cost.widen() == cut {
                *keep = false;
                ties_left -= 1;
            }
        }
    }
    Ok((keep, ties_left))
}
