//! Rows and columns of many matrices under one threshold.
//!
//! A row and a column of one matrix share a parameter, so the parameters that go are
//! `n_r·C + n_c·R − n_r·n_c` a layer, not a sum over units. The count still only grows along the
//! order, which is all that the search needs.

use rayon::prelude::*;

use super::search::{Crossing, Group, crossing};
use crate::error::{CoreError, Result};
use crate::units::{Kind, Shape, cost_of_key, count_false, expect_length, order_key};

/// One weight matrix: a cost for each row and column, and which of them still stand.
#[derive(Debug, Clone, Copy)]
pub struct CrossLayer<'a> {
    /// Cost of each row, `[R]`. Read at alive rows only.
    pub row_costs: &'a [f64],
    /// Cost of each column, `[C]`. Read at alive columns only.
    pub column_costs: &'a [f64],
    /// False for rows that are gone already, `[R]`.
    pub alive_rows: &'a [bool],
    /// False for columns that are gone already, `[C]`.
    pub alive_columns: &'a [bool],
}

/// Which kinds may go. The costs of a kind that may not are never read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    /// Rows are candidates.
    pub rows: bool,
    /// Columns are candidates.
    pub columns: bool,
}

/// What goes and what stays.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossSelection {
    /// For each layer `[R]`: false for rows that are dead or go now.
    pub keep_rows: Vec<Vec<bool>>,
    /// For each layer `[C]`: false for columns that are dead or go now.
    pub keep_columns: Vec<Vec<bool>>,
    /// Parameters removed, the overlap counted once, dead ones included.
    pub removed: u64,
    /// Parameters of all layers.
    pub total: u64,
    /// The largest cost that went, `-inf` if none did.
    pub threshold: f64,
    /// Rows and columns that go now.
    pub units_removed: u64,
}

/// Rows or columns of one layer.
#[derive(Clone, Copy)]
struct Side<'a> {
    costs: &'a [f64],
    alive: &'a [bool],
    candidates: bool,
    layer: usize,
    kind: Kind,
}

impl Side<'_> {
    /// Keys of the candidates, or the first cost that is not finite.
    fn keys(&self) -> Result<Vec<u64>> {
        if !self.candidates {
            return Ok(Vec::new());
        }
        let mut keys = Vec::with_capacity(self.costs.len());
        for (index, (&cost, &alive)) in self.costs.iter().zip(self.alive).enumerate() {
            if alive {
                if !cost.is_finite() {
                    let (layer, kind) = (self.layer, self.kind);
                    return Err(CoreError::NonFinite { layer, kind, index, value: cost });
                }
                keys.push(order_key(cost));
            }
        }
        Ok(keys)
    }

    /// Keep mask if all keys below `key` go, and those equal to it before index `cut`.
    fn mask(&self, key: u64, cut: usize) -> Vec<bool> {
        if !self.candidates {
            return self.alive.to_vec();
        }
        let goes = |index: usize, cost: f64| {
            let own = order_key(cost);
            own < key || (own == key && index < cut)
        };
        let entries = self.costs.iter().zip(self.alive).enumerate();
        entries.map(|(index, (&cost, &alive))| alive && !goes(index, cost)).collect()
    }
}

/// Parameters removed if layer `l` has lost `gone[2l]` rows and `gone[2l + 1]` columns.
fn removed_in_all(shapes: &[Shape], gone: impl Fn(usize) -> u64) -> u64 {
    let layers = shapes.iter().enumerate();
    layers.map(|(layer, shape)| shape.removed(gone(2 * layer), gone(2 * layer + 1))).sum()
}

/// Removes the cheapest rows and columns of all layers until `target` parameters are gone.
///
/// `target` counts what is gone in total, dead rows and columns included: if they reach it alone,
/// nothing more goes. The result is the shortest prefix of the order (cost, layer, kind, index)
/// that reaches the target. Expected time O(n), memory O(n) for n rows and columns.
///
/// # Errors
/// [`CoreError::NonFinite`] for the first candidate, in the order of layers, whose cost is NaN or
/// infinite; [`CoreError::Target`] if everything that may go is not enough; [`CoreError::Length`]
/// if a mask and its costs differ in length; [`CoreError::Overflow`] if the parameters do not fit
/// 64 bits.
///
/// ```
/// use _core::select::cross::{CrossLayer, Kinds, select_rows_columns};
///
/// let layer = CrossLayer {
///     row_costs: &[1.0, 5.0],
///     column_costs: &[2.0, 9.0, 9.0],
///     alive_rows: &[true; 2],
///     alive_columns: &[true; 3],
/// };
/// let both = Kinds { rows: true, columns: true };
/// let selection = select_rows_columns(&[layer], both, 4)?;
/// assert_eq!(selection.keep_rows, [[false, true]]);
/// assert_eq!(selection.keep_columns, [[false, true, true]]);
/// assert_eq!((selection.removed, selection.total), (4, 6));
/// # Ok::<(), _core::CoreError>(())
/// ```
pub fn select_rows_columns(
    layers: &[CrossLayer<'_>],
    kinds: Kinds,
    target: u64,
) -> Result<CrossSelection> {
    let sides = sides(layers, kinds)?;
    let shapes: Vec<Shape> = layers
        .iter()
        .map(|layer| Shape {
            rows: layer.row_costs.len() as u64,
            columns: layer.column_costs.len() as u64,
        })
        .collect();
    let total = crate::units::total_parameters(&shapes)?;
    let dead: Vec<u64> = sides.par_iter().map(|side| count_false(side.alive)).collect();
    let keys: Vec<Result<Vec<u64>>> = sides.par_iter().map(Side::keys).collect();
    let mut groups = Vec::with_capacity(keys.len());
    for keys in keys {
        groups.push(Group::new(keys?));
    }

    let dead_alone = removed_in_all(&shapes, |group| dead[group]);
    if dead_alone >= target {
        return Ok(CrossSelection {
            keep_rows: layers.iter().map(|layer| layer.alive_rows.to_vec()).collect(),
            keep_columns: layers.iter().map(|layer| layer.alive_columns.to_vec()).collect(),
            removed: dead_alone,
            total,
            threshold: f64::NEG_INFINITY,
            units_removed: 0,
        });
    }
    let available = removed_in_all(&shapes, |group| dead[group] + groups[group].len() as u64);
    if available < target {
        return Err(CoreError::Target { requested: target, available });
    }
    let found = crossing(&mut groups, target, |gone| {
        removed_in_all(&shapes, |group| dead[group] + gone[group])
    });
    drop(groups);

    let gone = dead.iter().zip(&found.below).map(|(dead, below)| dead + below).collect();
    let ties = break_ties(&sides, &shapes, gone, &found, target);
    let mut masks: Vec<Vec<bool>> =
        sides.par_iter().zip(&ties.cuts).map(|(side, &cut)| side.mask(found.key, cut)).collect();
    let keep_columns = masks.iter_mut().skip(1).step_by(2).map(std::mem::take).collect();
    let keep_rows = masks.into_iter().step_by(2).collect();
    Ok(CrossSelection {
        keep_rows,
        keep_columns,
        removed: ties.removed,
        total,
        threshold: cost_of_key(found.key),
        units_removed: found.count.iter().sum::<usize>() as u64 + ties.units,
    })
}

/// Rows of layer 0, columns of layer 0, rows of layer 1, …: the order in which ties break.
fn sides<'a>(layers: &[CrossLayer<'a>], kinds: Kinds) -> Result<Vec<Side<'a>>> {
    let mut sides = Vec::with_capacity(2 * layers.len());
    for (layer, l) in layers.iter().enumerate() {
        expect_length(layer, "alive_rows", l.row_costs.len(), l.alive_rows.len())?;
        expect_length(layer, "alive_columns", l.column_costs.len(), l.alive_columns.len())?;
        let (costs, alive, candidates) = (l.row_costs, l.alive_rows, kinds.rows);
        sides.push(Side { costs, alive, candidates, layer, kind: Kind::Row });
        let (costs, alive, candidates) = (l.column_costs, l.alive_columns, kinds.columns);
        sides.push(Side { costs, alive, candidates, layer, kind: Kind::Column });
    }
    Ok(sides)
}

/// How the units whose cost equals the threshold are divided.
struct Ties {
    /// For each side: those before this index go.
    cuts: Vec<usize>,
    /// Number of units that go.
    units: u64,
    /// Parameters removed in the end.
    removed: u64,
}

/// Lets units with the threshold's cost go one by one, in order, until the target is reached.
fn break_ties(
    sides: &[Side<'_>],
    shapes: &[Shape],
    mut gone: Vec<u64>,
    found: &Crossing,
    target: u64,
) -> Ties {
    let mut removed = removed_in_all(shapes, |group| gone[group]);
    let mut ties = Ties { cuts: vec![0; sides.len()], units: 0, removed };
    for (group, side) in sides.iter().enumerate() {
        if found.ties[group] == 0 || removed >= target {
            continue;
        }
        let shape = shapes[side.layer];
        // A row frees the columns that still stand, and the other way round.
        let frees = match side.kind {
            Kind::Row => shape.columns - gone[group + 1],
            _ => shape.rows - gone[group - 1],
        };
        let entries = side.costs.iter().zip(side.alive).enumerate();
        for (index, _) in entries.filter(|(_, (c, a))| **a && order_key(**c) == found.key) {
            if removed >= target {
                break;
            }
            removed += frees;
            gone[group] += 1;
            ties.units += 1;
            ties.cuts[group] = index + 1;
        }
    }
    ties.removed = removed;
    ties
}

#[cfg(test)]
mod tests;
