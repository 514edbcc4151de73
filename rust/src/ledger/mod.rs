//! What has been removed so far, shot by shot.
//!
//! [`Ledger`] books whole rows and columns and keeps their masks. [`ElementLedger`] books single
//! elements, whose masks stand in the weights themselves, and keeps counts alone.

mod books;
mod bytes;
mod elements;
mod rows_columns;

pub use books::Books;
pub use elements::ElementLedger;
pub use rows_columns::Ledger;

use crate::error::{CoreError, Result};

/// Check that the ledger has such a layer.
fn expect_layer(layer: usize, layers: usize) -> Result<()> {
    if layer < layers { Ok(()) } else { Err(CoreError::NoLayer { layer, layers }) }
}
