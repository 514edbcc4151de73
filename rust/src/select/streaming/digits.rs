//! Floating-point costs as strings of 16-bit digits.

use crate::units::{cost_of_key, order_key};

/// Bits of a digit.
pub(super) const DIGIT_BITS: u32 = 16;
/// Number of values of a digit.
pub(super) const DIGIT_VALUES: usize = 1 << DIGIT_BITS;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

/// `f32` or `f64`.
///
/// A cost maps to a 64-bit key of the same order, in which `-0.0` is `+0.0`. The key's upper bits
/// carry the cost, in `DIGITS` digits of 16 bits; what is below them is zero.
pub trait Cost: Copy + PartialOrd + Send + Sync + sealed::Sealed + 'static {
    /// Number of 16-bit digits that tell any two costs apart.
    const DIGITS: u32;
    /// `NumPy`'s name of the type.
    const NAME: &'static str;
    /// The key's upper digit.
    fn first_digit(self) -> u16;
    /// The whole key.
    fn key(self) -> u64;
    /// The cost with this key.
    fn of_key(key: u64) -> Self;
    /// Neither NaN nor infinite.
    fn finite(self) -> bool;
    /// The same number as `f64`.
    fn widen(self) -> f64;
}

impl Cost for f32 {
    const DIGITS: u32 = 2;
    const NAME: &'static str = "float32";

    #[inline]
    fn first_digit(self) -> u16 {
        (short_key(self) >> 16) as u16
    }

    #[inline]
    fn key(self) -> u64 {
        u64::from(short_key(self)) << 32
    }

    #[inline]
    fn of_key(key: u64) -> Self {
        let key = (key >> 32) as u32;
        f32::from_bits(if key >> 31 == 0 { !key } else { key & (u32::MAX >> 1) })
    }

    #[inline]
    fn finite(self) -> bool {
        self.abs() < f32::INFINITY
    }

    #[inline]
    fn widen(self) -> f64 {
        f64::from(self)
    }
}

/// [`order_key`] in 32 bits.
#[inline]
fn short_key(cost: f32) -> u32 {
    order_of_bits((cost + 0.0).to_bits())
}

/// Turns the upper bits of a float into an integer of the same order.
#[inline]
fn order_of_bits(bits: u32) -> u32 {
    // All ones for a negative cost, only the sign bit otherwise.
    bits ^ ((bits.cast_signed() >> 31).cast_unsigned() | 1 << 31)
}

impl Cost for f64 {
    const DIGITS: u32 = 4;
    const NAME: &'static str = "float64";

    #[inline]
    fn first_digit(self) -> u16 {
        (order_of_bits(((self + 0.0).to_bits() >> 32) as u32) >> 16) as u16
    }

    #[inline]
    fn key(self) -> u64 {
        order_key(self)
    }

    #[inline]
    fn of_key(key: u64) -> Self {
        cost_of_key(key)
    }

    #[inline]
    fn finite(self) -> bool {
        self.abs() < f64::INFINITY
    }

    #[inline]
    fn widen(self) -> f64 {
        self
    }
}

/// First digits of finite costs. What lies outside is infinite or NaN: the boundary between the
/// largest finite number and infinity falls between two digits.
pub(super) fn finite_digits<T: Cost>() -> std::ops::RangeInclusive<u16> {
    let largest = if T::DIGITS == 2 { f32::MAX.first_digit() } else { f64::MAX.first_digit() };
    u16::MAX - largest..=largest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn first_digits_tell_finite_from_the_rest(bits in any::<u64>()) {
            let long = f64::from_bits(bits);
            let short = f32::from_bits(bits as u32);
            prop_assert_eq!(finite_digits::<f64>().contains(&long.first_digit()), long.finite());
            prop_assert_eq!(finite_digits::<f32>().contains(&short.first_digit()), short.finite());
            prop_assert_eq!(long.finite(), long.is_finite());
            prop_assert_eq!(short.finite(), short.is_finite());
        }

        #[test]
        fn keys_keep_the_order_of_the_reals(a in any::<f32>(), b in any::<f32>()) {
            prop_assert_eq!(Some(a.key().cmp(&b.key())), a.partial_cmp(&b));
            prop_assert_eq!(f32::of_key(a.key()).to_bits(), (a + 0.0).to_bits());
            prop_assert_eq!(a.key() >> 48, u64::from(a.first_digit()));
            let long = a.widen() * 1.000_000_000_1;
            prop_assert_eq!(long.key() >> 48, u64::from(long.first_digit()));
        }
    }

    #[test]
    fn infinities_and_nans_of_either_sign_are_not_finite() {
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN] {
            assert!(!finite_digits::<f32>().contains(&bad.first_digit()));
            assert!(!finite_digits::<f64>().contains(&bad.widen().first_digit()));
        }
        for good in [f32::MAX, f32::MIN, 0.0, -0.0, f32::MIN_POSITIVE] {
            assert!(finite_digits::<f32>().contains(&good.first_digit()));
        }
        assert_eq!((-0.0_f32).key(), 0.0_f32.key());
    }
}
