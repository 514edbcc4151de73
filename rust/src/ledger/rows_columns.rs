//! Books of rows and columns, masks included.

use super::{Books, bytes, bytes::Booked, expect_layer};
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
    books: Books,
}

impl Ledger {
    /// An empty ledger for matrices of these shapes: everything stands.
    ///
    /// # Errors
    /// [`CoreError::Overflow`] if the parameters do not fit 64 bits, [`CoreError::Memory`] if the
    /// masks do not fit the memory.
    pub fn new(shapes: Vec<Shape>) -> Result<Self> {
        let books = Books::new(total_parameters(&shapes)?);
        let masks = |side: fn(&Shape) -> u64| -> Result<Vec<Vec<bool>>> {
            shapes.iter().map(|shape| all_kept(side(shape))).collect()
        };
        let keep_rows = masks(|shape| shape.rows)?;
        let keep_columns = masks(|shape| shape.columns)?;
        Ok(Self { shapes, keep_rows, keep_columns, books })
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
        for (own, new) in self.keep_rows.iter_mut().zip(keep_rows) {
            own.copy_from_slice(new);
        }
        for (own, new) in self.keep_columns.iter_mut().zip(keep_columns) {
            own.copy_from_slice(new);
        }
        Ok(self.books.close(self.count()))
    }

    /// The sums over all layers, shot by shot.
    #[must_use]
    pub fn books(&self) -> &Books {
        &self.books
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
        expect_layer(layer, self.layers())?;
        Ok(self.count_layer(layer))
    }

    /// One layer's rows, `[R]`: false for those that are gone.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn keep_rows(&self, layer: usize) -> Result<&[bool]> {
        expect_layer(layer, self.layers())?;
        Ok(&self.keep_rows[layer])
    }

    /// One layer's columns, `[C]`: false for those that are gone.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn keep_columns(&self, layer: usize) -> Result<&[bool]> {
        expect_layer(layer, self.layers())?;
        Ok(&self.keep_columns[layer])
    }

    /// The ledger as bytes that [`Ledger::from_bytes`] reads back on any machine.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let layers: Vec<_> = self.shapes.iter().map(|shape| [shape.rows, shape.columns]).collect();
        let masks = self.keep_rows.iter().zip(&self.keep_columns);
        let masks = masks.map(|(rows, columns)| (rows.as_slice(), columns.as_slice()));
        bytes::write(Booked::RowsColumns, &layers, self.books.history(), masks)
    }

    /// Reads what [`Ledger::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CoreError::Corrupt`] if anything is missing, left over, damaged or contradictory, or if
    /// the format is of a newer version; [`CoreError::OtherLedger`] for a ledger of elements.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (layers, history, mut rest) = bytes::read(Booked::RowsColumns, bytes)?;
        let shapes: Vec<Shape> =
            layers.into_iter().map(|[rows, columns]| Shape { rows, columns }).collect();
        let mut masks = Vec::with_capacity(shapes.len());
        for shape in &shapes {
            masks.push(rest.masks(shape.rows, shape.columns)?);
        }
        rest.end()?;
        let total = total_parameters(&shapes)
            .map_err(|_| CoreError::Corrupt("its layers are too large"))?;
        let (keep_rows, keep_columns) = masks.into_iter().unzip();
        let ledger = Self { shapes, keep_rows, keep_columns, books: Books::new(total) };
        let books = Books::read(total, history, ledger.count())?;
        Ok(Self { books, ..ledger })
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
