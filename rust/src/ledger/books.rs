//! The sums that every ledger keeps.

use crate::error::{CoreError, Result};

/// How many parameters are gone after each shot. Never fewer than after the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Books {
    total: u64,
    history: Vec<u64>,
}

impl Books {
    /// Books of `total` parameters that all stand.
    pub(super) fn new(total: u64) -> Self {
        Self { total, history: Vec::new() }
    }

    /// Books read from bytes, if they agree with what the layers lost.
    pub(super) fn read(total: u64, history: Vec<u64>, removed: u64) -> Result<Self> {
        let books = Self { total, history };
        if !books.history.is_sorted() || books.removed() != removed {
            return Err(CoreError::Corrupt("its history contradicts its layers"));
        }
        Ok(books)
    }

    /// Closes a shot after which `removed` parameters are gone; returns how many of them are new.
    pub(super) fn close(&mut self, removed: u64) -> u64 {
        let before = self.removed();
        self.history.push(removed);
        removed - before
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
}
