//! What has been removed so far, shot by shot.

mod bytes;

use crate::error::{CoreError, Result};
use crate::units::{Kind, Shape, count_false, expect_layers, expect_length, total_parameters};

/// Books of the rows and columns that are gone, over all shots.
///
/// A shot can only take away: what was removed before never comes back. Counts are exact, with
/// the overlap of rows and columns counted once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    shapes: Vec<Shape>,
    keep_rows: Vec<Vec<bool>>,
    keep_columns: Vec<Vec<bool>>,
    history: Vec<u64>,
    total: u64,
}

impl Ledger {
    /// An empty ledger for matrices of these shapes: everything stands.
    ///
    /// # Errors
    /// [`CoreError::Overflow`] if the parameters do not fit 64 bits, [`CoreError::Memory`] if the
    /// masks do not fit the memory.
    pub fn new(shapes: Vec<Shape>) -> Result<Self> {
        let total = total_parameters(&shapes)?;
        let masks = |side: fn(&Shape) -> u64| -> Result<Vec<Vec<bool>>> {
            shapes.iter().map(|shape| all_kept(side(shape))).collect()
        };
        let keep_rows = masks(|shape| shape.rows)?;
        let keep_columns = masks(|shape| shape.columns)?;
        Ok(Self { shapes, keep_rows, keep_columns, history: Vec::new(), total })
    }

    /// Books one shot and returns the parameters that it newly removed.
    ///
    /// The masks say what stands after the shot, one of length R and one of length C a layer.
    ///
    /// # Errors
    /// [`CoreError::Layers`] or [`CoreError::Length`] if the masks do not fit the shapes,
    /// [`CoreError::Regrown`] if something removed before is kept now. Nothing changes then.
    pub fn commit(&mut self, keep_rows: &[&[bool]], keep_columns: &[&[bool]]) -> Result<u64> {
        expect_layers("keep_rows", self.shapes.len(), keep_rows.len())?;
        expect_layers("keep_columns", self.shapes.len(), keep_columns.len())?;
        for layer in 0..self.shapes.len() {
            let (rows, columns) = (keep_rows[layer], keep_columns[layer]);
            expect_length(layer, "keep_rows", self.keep_rows[layer].len(), rows.len())?;
            expect_length(layer, "keep_columns", self.keep_columns[layer].len(), columns.len())?;
            refuse_regrowth(layer, Kind::Row, &self.keep_rows[layer], rows)?;
            refuse_regrowth(layer, Kind::Column, &self.keep_columns[layer], columns)?;
        }
        let before = self.removed();
        for (own, new) in self.keep_rows.iter_mut().zip(keep_rows) {
            own.copy_from_slice(new);
        }
        for (own, new) in self.keep_columns.iter_mut().zip(keep_columns) {
            own.copy_from_slice(new);
        }
        let after = self.count();
        self.history.push(after);
        Ok(after - before)
    }

    /// Parameters removed so far.
    #[must_use]
    pub fn removed(&self) -> u64 {
        self.history.last().copied().unwrap_or(0)
    }

    /// Parameters of all layers, the removed ones included.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Removed part of the total, 0 for a ledger without parameters.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn sparsity(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.removed() as f64 / self.total as f64 }
    }

    /// Number of shots booked.
    #[must_use]
    pub fn shots(&self) -> usize {
        self.history.len()
    }

    /// Parameters removed in total after each shot.
    #[must_use]
    pub fn history(&self) -> &[u64] {
        &self.history
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.shapes.len()
    }

    /// Parameters removed from one layer. O(R + C).
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn layer_removed(&self, layer: usize) -> Result<u64> {
        self.check(layer)?;
        Ok(self.count_layer(layer))
    }

    /// One layer's rows, `[R]`: false for those that are gone.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn keep_rows(&self, layer: usize) -> Result<&[bool]> {
        self.check(layer)?;
        Ok(&self.keep_rows[layer])
    }

    /// One layer's columns, `[C]`: false for those that are gone.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn keep_columns(&self, layer: usize) -> Result<&[bool]> {
        self.check(layer)?;
        Ok(&self.keep_columns[layer])
    }

    fn check(&self, layer: usize) -> Result<()> {
        let layers = self.shapes.len();
        if layer < layers { Ok(()) } else { Err(CoreError::NoLayer { layer, layers }) }
    }

    fn count_layer(&self, layer: usize) -> u64 {
        let rows = count_false(&self.keep_rows[layer]);
        self.shapes[layer].removed(rows, count_false(&self.keep_columns[layer]))
    }

    fn count(&self) -> u64 {
        (0..self.shapes.len()).map(|layer| self.count_layer(layer)).sum()
    }
}

fn all_kept(length: u64) -> Result<Vec<bool>> {
    let length = usize::try_from(length).map_err(|_| CoreError::Memory("the masks"))?;
    let mut mask = Vec::new();
    mask.try_reserve_exact(length).map_err(|_| CoreError::Memory("the masks"))?;
    mask.resize(length, true);
    Ok(mask)
}

fn refuse_regrowth(layer: usize, kind: Kind, before: &[bool], after: &[bool]) -> Result<()> {
    match before.iter().zip(after).position(|(before, after)| !before & after) {
        Some(index) => Err(CoreError::Regrown { layer, kind, index }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
