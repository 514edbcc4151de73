//! The selection core of the pruner: what goes, counted exactly.
//!
//! Costs come in, masks and exact 64-bit counts come out. Three rules hold everywhere:
//!
//! * **Order.** Candidates are ranked by (cost, layer, kind, index), ascending; rows stand before
//!   columns; `-0.0` is `+0.0`. The order is total, so the result does not depend on the number
//!   of threads.
//! * **Target.** A target is a number of parameters that are removed *in total*, dead ones
//!   included. The result is the shortest prefix of the order that reaches it.
//! * **Refusal.** A cost that is NaN or infinite among the candidates is an error that names
//!   layer, kind and index; it is never replaced by a number.
//!
//! The crate knows nothing of tensors, files or models. Only the module `python`, behind the
//! feature of the same name, knows that Python exists.

pub mod error;
pub mod ledger;
pub mod nm;
pub mod schedule;
pub mod select;
pub mod units;

#[cfg(feature = "python")]
mod python;
#[cfg(test)]
mod testing;

pub use error::{CoreError, Result};

/// The version of the crate, as in its manifest.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
