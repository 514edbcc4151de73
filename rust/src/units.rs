//! Kinds of unit, the total order on costs, and exact counts.

use std::fmt;

use rayon::prelude::*;

use crate::error::{CoreError, Result};

/// What a cost belongs to. The order is the one in which ties break inside a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A row of a weight matrix: an output feature.
    Row,
    /// A column of a weight matrix: an input feature.
    Column,
    /// An independent unit with a size of its own: a head, a neuron, a block.
    Unit,
    /// A single weight.
    Element,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Row => "row",
            Self::Column => "column",
            Self::Unit => "unit",
            Self::Element => "element",
        })
    }
}

const SIGN: u64 = 1 << 63;

/// Maps a finite cost to an integer of the same order; `-0.0` and `+0.0` map to one key.
///
/// ```
/// use _core::units::{cost_of_key, order_key};
///
/// assert!(order_key(-1e-12) < order_key(0.0));
/// assert_eq!(order_key(-0.0), order_key(0.0));
/// assert_eq!(cost_of_key(order_key(2.5)), 2.5);
/// ```
#[inline]
#[must_use]
pub fn order_key(cost: f64) -> u64 {
    let bits = (cost + 0.0).to_bits();
    if bits & SIGN == 0 { bits | SIGN } else { !bits }
}

/// The cost that [`order_key`] maps to `key`.
#[inline]
#[must_use]
pub fn cost_of_key(key: u64) -> f64 {
    f64::from_bits(if key & SIGN == 0 { !key } else { key & !SIGN })
}

/// A weight matrix's shape, which is all that counting needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of rows: output features.
    pub rows: u64,
    /// Number of columns: input features, the bias column counted.
    pub columns: u64,
}

impl Shape {
    /// Number of parameters.
    ///
    /// # Errors
    /// [`CoreError::Overflow`] if it does not fit 64 bits.
    pub fn parameters(self) -> Result<u64> {
        self.rows.checked_mul(self.columns).ok_or(CoreError::Overflow)
    }

    /// Parameters that go with `rows` rows and `columns` columns, the overlap counted once.
    ///
    /// Cannot overflow where [`Shape::parameters`] does not and no more goes than there is.
    #[must_use]
    pub fn removed(self, rows: u64, columns: u64) -> u64 {
        debug_assert!(rows <= self.rows && columns <= self.columns);
        rows * self.columns + columns * (self.rows - rows)
    }
}

/// Number of parameters of all `shapes`.
///
/// # Errors
/// [`CoreError::Overflow`] if it does not fit 64 bits.
pub fn total_parameters(shapes: &[Shape]) -> Result<u64> {
    shapes.iter().try_fold(0_u64, |sum, shape| {
        sum.checked_add(shape.parameters()?).ok_or(CoreError::Overflow)
    })
}

/// Number of `false` entries: what is dead in an alive mask, removed in a keep mask.
#[must_use]
pub fn count_false(mask: &[bool]) -> u64 {
    mask.iter().map(|&keep| u64::from(!keep)).sum()
}

/// Entries that one thread counts at a time.
const COUNTED: usize = if cfg!(test) { 1000 } else { 1 << 18 };

/// Number of zero bytes: what is removed in a keep mask of single elements, on all threads if it
/// is long.
#[must_use]
pub fn count_zeros(mask: &[u8]) -> u64 {
    // Sums of bytes vectorise best; none of them reaches 256.
    let few = |part: &[u8]| part.iter().map(|&byte| u8::from(byte == 0)).sum::<u8>();
    let many = |part: &[u8]| part.chunks(128).map(|part| u64::from(few(part))).sum::<u64>();
    mask.par_chunks(COUNTED).map(many).sum()
}

/// Length check with the layer's number in the error.
pub(crate) fn expect_length(
    layer: usize,
    what: &'static str,
    expected: usize,
    found: usize,
) -> Result<()> {
    if expected == found { Ok(()) } else { Err(CoreError::Length { layer, what, expected, found }) }
}

/// Check that a list has one entry a layer.
pub(crate) fn expect_layers(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(CoreError::Layers { what, expected, found }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_keep_the_order_of_the_reals(a in -1e300_f64..1e300, b in -1e-300_f64..1e300) {
            prop_assert_eq!(order_key(a).cmp(&order_key(b)), a.partial_cmp(&b).unwrap());
            prop_assert_eq!(cost_of_key(order_key(a)).to_bits(), (a + 0.0).to_bits());
        }

        #[test]
        fn the_overlap_counts_once(rows in 0_u64..9, columns in 0_u64..9, r in 0_u64..9, c in 0_u64..9) {
            let (r, c) = (r.min(rows), c.min(columns));
            let brute = (0..rows)
                .flat_map(|i| (0..columns).map(move |j| (i, j)))
                .filter(|&(i, j)| i < r || j < c)
                .count() as u64;
            prop_assert_eq!(Shape { rows, columns }.removed(r, c), brute);
        }
    }

    #[test]
    fn zeros_are_counted_in_masks_of_every_length() {
        let mask: Vec<u8> = (0..5003_u32).map(|i| (i * i % 7 % 3) as u8 * 127).collect();
        for length in (0..300).chain([999, 1000, 1001, 4096, 5003]) {
            for mask in [&mask, &vec![0; 5003], &vec![255; 5003]] {
                let slow = mask[..length].iter().map(|&byte| u64::from(byte == 0)).sum::<u64>();
                assert_eq!(count_zeros(&mask[..length]), slow);
            }
        }
    }

    #[test]
    fn too_many_parameters_are_an_error() {
        let huge = Shape { rows: u64::MAX, columns: 2 };
        assert_eq!(total_parameters(&[huge]), Err(CoreError::Overflow));
        let half = Shape { rows: u64::MAX, columns: 1 };
        assert_eq!(total_parameters(&[half, half]), Err(CoreError::Overflow));
    }
}
