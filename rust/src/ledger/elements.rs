//! Books of single elements: counts alone, since the masks stand in the weights themselves.

use std::{iter, mem};

use super::{Books, bytes, bytes::Booked, expect_layer};
use crate::error::{CoreError, Result};
use crate::units::{count_zeros, expect_length};

/// Books of the single weights that are gone, over all shots.
///
/// Each shot books every layer once and is closed by [`ElementLedger::commit`], so that no more
/// than one mask need be in memory. A layer never has fewer elements removed than before; which
/// ones they are is not remembered.
#[derive(Debug, Clone)]
pub struct ElementLedger {
    sizes: Vec<u64>,
    removed: Vec<u64>,
    /// What is gone in the layers that the shot in progress has booked.
    staged: Vec<Option<u64>>,
    books: Books,
}

/// Two ledgers are equal if their closed shots are.
impl PartialEq for ElementLedger {
    fn eq(&self, other: &Self) -> bool {
        (&self.sizes, &self.removed, &self.books) == (&other.sizes, &other.removed, &other.books)
    }
}

impl Eq for ElementLedger {}

impl ElementLedger {
    /// An empty ledger for layers of so many parameters: everything stands.
    ///
    /// # Errors
    /// [`CoreError::Overflow`] if the parameters do not fit 64 bits together.
    pub fn new(sizes: Vec<u64>) -> Result<Self> {
        let books = Books::new(total(&sizes).ok_or(CoreError::Overflow)?);
        Ok(Self { removed: vec![0; sizes.len()], staged: vec![None; sizes.len()], sizes, books })
    }

    /// Stages one layer for the shot in progress.
    ///
    /// The mask says what stands after the shot: 0 for an element that is gone, any other byte for
    /// one that stays. Long masks are counted on all threads.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`]; [`CoreError::Length`] if the mask does not fit the layer;
    /// [`CoreError::Twice`] if the shot has booked the layer already. What was staged stays then.
    pub fn book(&mut self, layer: usize, keep: &[u8]) -> Result<()> {
        expect_layer(layer, self.layers())?;
        expect_length(layer, "keep", self.sizes[layer] as usize, keep.len())?;
        if self.staged[layer].is_some() {
            return Err(CoreError::Twice { layer });
        }
        self.staged[layer] = Some(count_zeros(keep));
        Ok(())
    }

    /// Closes the shot in progress and returns the parameters that it newly removed.
    ///
    /// # Errors
    /// [`CoreError::Unbooked`] or [`CoreError::Fewer`] for the first layer that the shot did not
    /// book, or in which it left fewer removed than before. Nothing is booked then, and the shot
    /// must be staged again from its first layer.
    pub fn commit(&mut self) -> Result<u64> {
        let staged = mem::replace(&mut self.staged, vec![None; self.sizes.len()]);
        let mut removed = Vec::with_capacity(staged.len());
        for (layer, (after, &before)) in staged.into_iter().zip(&self.removed).enumerate() {
            let after = after.ok_or(CoreError::Unbooked { layer })?;
            if after < before {
                return Err(CoreError::Fewer { layer, before, after });
            }
            removed.push(after);
        }
        self.removed = removed;
        Ok(self.books.close(self.removed.iter().sum()))
    }

    /// The sums over all layers, shot by shot.
    #[must_use]
    pub fn books(&self) -> &Books {
        &self.books
    }

    /// Number of layers.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.sizes.len()
    }

    /// Parameters removed from one layer.
    ///
    /// # Errors
    /// [`CoreError::NoLayer`].
    pub fn layer_removed(&self, layer: usize) -> Result<u64> {
        expect_layer(layer, self.layers())?;
        Ok(self.removed[layer])
    }

    /// The closed shots as bytes that [`ElementLedger::from_bytes`] reads back on any machine.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let layers = self.sizes.iter().zip(&self.removed);
        let layers: Vec<_> = layers.map(|(&size, &removed)| [size, removed]).collect();
        bytes::write(Booked::Elements, &layers, self.books.history(), iter::empty())
    }

    /// Reads what [`ElementLedger::to_bytes`] wrote.
    ///
    /// # Errors
    /// [`CoreError::Corrupt`] if anything is missing, left over, damaged or contradictory, or if
    /// the format is of a newer version; [`CoreError::OtherLedger`] for a ledger of rows and
    /// columns.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (layers, history, rest) = bytes::read(Booked::Elements, bytes)?;
        rest.end()?;
        if layers.iter().any(|[size, removed]| removed > size) {
            return Err(CoreError::Corrupt("a layer has lost more than it had"));
        }
        let (sizes, removed): (Vec<u64>, Vec<u64>) =
            layers.into_iter().map(<(u64, u64)>::from).unzip();
        let total = total(&sizes).ok_or(CoreError::Corrupt("its layers are too large"))?;
        let books = Books::read(total, history, removed.iter().sum())?;
        Ok(Self { staged: vec![None; sizes.len()], sizes, removed, books })
    }
}

fn total(sizes: &[u64]) -> Option<u64> {
    sizes.iter().try_fold(0, |sum: u64, &size| sum.checked_add(size))
}

#[cfg(test)]
mod tests;
