//! Everything that can go wrong, in one enum.

use crate::units::Kind;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, CoreError>;

/// Why the core refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CoreError {
    /// A candidate's cost is NaN or infinite.
    #[error("cost of {kind} {index} of layer {layer} is {value}: costs must be finite")]
    NonFinite {
        /// Position of the layer in the order given.
        layer: usize,
        /// What the cost belongs to.
        kind: Kind,
        /// Position inside the layer (row-major for elements).
        index: usize,
        /// The offending cost.
        value: f64,
    },
    /// More is to be removed than there is.
    #[error(
        "{requested} parameters are to be removed but only {available} can be: lower the sparsity"
    )]
    Target {
        /// Parameters to remove.
        requested: u64,
        /// Parameters that can be removed.
        available: u64,
    },
    /// A layer's array has the wrong length.
    #[error("layer {layer}: {what} has length {found}, expected {expected}")]
    Length {
        /// Position of the layer.
        layer: usize,
        /// Which array.
        what: &'static str,
        /// Length that fits.
        expected: usize,
        /// Length found.
        found: usize,
    },
    /// A list has not one entry a layer.
    #[error("{what} has {found} layers, expected {expected}")]
    Layers {
        /// Which list.
        what: &'static str,
        /// Number of layers that fits.
        expected: usize,
        /// Number of layers found.
        found: usize,
    },
    /// The parameters of all layers together do not fit 64 bits.
    #[error("the number of parameters does not fit 64 bits")]
    Overflow,
    /// Something that was removed in an earlier shot is kept again.
    #[error("{kind} {index} of layer {layer} was removed in an earlier shot and cannot come back")]
    Regrown {
        /// Position of the layer.
        layer: usize,
        /// Row or column.
        kind: Kind,
        /// Position inside the layer.
        index: usize,
    },
    /// A layer has lost fewer elements than after an earlier shot.
    #[error(
        "layer {layer} has lost {after} elements, but {before} after an earlier shot: they cannot come back"
    )]
    Fewer {
        /// Position of the layer.
        layer: usize,
        /// Elements gone after the earlier shot.
        before: u64,
        /// Elements gone now.
        after: u64,
    },
    /// A layer is booked a second time in one shot.
    #[error("layer {layer} is booked twice in one shot")]
    Twice {
        /// Position of the layer.
        layer: usize,
    },
    /// A shot is to be closed although a layer is missing.
    #[error("layer {layer} is not booked in this shot")]
    Unbooked {
        /// Position of the layer.
        layer: usize,
    },
    /// There is no such layer.
    #[error("there is no layer {layer}: the ledger has {layers}")]
    NoLayer {
        /// Layer asked for.
        layer: usize,
        /// Number of layers.
        layers: usize,
    },
    /// An argument that makes no sense by itself.
    #[error("{0}")]
    Argument(String),
    /// Bytes that are no ledger, or a damaged one.
    #[error("this is no intact ledger: {0}")]
    Corrupt(&'static str),
    /// Bytes of another kind of ledger.
    #[error("this is a ledger of {found}, not of {expected}")]
    OtherLedger {
        /// What the ledger was to book.
        expected: &'static str,
        /// What it books.
        found: &'static str,
    },
    /// The memory for the result cannot be had.
    #[error("not enough memory for {0}")]
    Memory(&'static str),
}
