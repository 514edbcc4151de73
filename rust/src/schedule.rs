//! Targets in whole parameters, exact where floating point would round.

use crate::error::{CoreError, Result};

/// Decimal places to which a sparsity is read: a float that came from `0.3` means 3/10.
const SCALE: u128 = 1_000_000_000_000;

/// Longest schedule: far beyond any use, short enough that a slip cannot exhaust the memory.
const MOST_SHOTS: u64 = 1_000_000;

/// Parameters that must go so that at least the fraction `sparsity` of `total` is gone.
///
/// `⌈total · sparsity⌉`, with the sparsity read as the decimal number of at most 12 places that
/// it was written as: 0.3 of 10 is 3, although the float 0.3·10 is a little more.
///
/// # Errors
/// [`CoreError::Argument`] unless `0 <= sparsity < 1`.
///
/// ```
/// # use _core::schedule::removal_target;
/// assert_eq!(removal_target(10, 0.3)?, 3);
/// assert_eq!(removal_target(10, 0.31)?, 4);
/// # Ok::<(), _core::CoreError>(())
/// ```
pub fn removal_target(total: u64, sparsity: f64) -> Result<u64> {
    if !(0.0..1.0).contains(&sparsity) {
        return Err(CoreError::Argument(format!(
            "sparsity must lie in [0, 1), not {sparsity}: it is the part that is removed"
        )));
    }
    // In [0, 1e12], so neither the sign nor a digit is lost.
    #[allow(clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let parts = (sparsity * SCALE as f64).round() as u128;
    Ok((u128::from(total) * parts).div_ceil(SCALE) as u64)
}

/// Parameters removed in total after each of `shots` equal steps towards `target` of `total`.
///
/// Entry `t − 1` is `⌈target · t / shots⌉`; the last one is `target`.
///
/// # Errors
/// [`CoreError::Argument`] if there is no shot or more than a million;
/// [`CoreError::Target`] if `target` exceeds `total`.
///
/// ```
/// # use _core::schedule::linear_schedule;
/// assert_eq!(linear_schedule(100, 50, 4)?, [13, 25, 38, 50]);
/// # Ok::<(), _core::CoreError>(())
/// ```
pub fn linear_schedule(total: u64, target: u64, shots: u64) -> Result<Vec<u64>> {
    if !(1..=MOST_SHOTS).contains(&shots) {
        return Err(CoreError::Argument(format!(
            "the number of shots must lie between 1 and {MOST_SHOTS}, not {shots}"
        )));
    }
    if target > total {
        return Err(CoreError::Target { requested: target, available: total });
    }
    let after =
        |shot: u64| (u128::from(target) * u128::from(shot)).div_ceil(u128::from(shots)) as u64;
    Ok((1..=shots).map(after).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against long division of decimal digits, which knows no floating point.
        #[test]
        fn targets_are_exact_in_decimal(total in any::<u64>(), digits in 0_u64..1_000_000) {
            let sparsity: f64 = format!("0.{digits:06}").parse().unwrap();
            let exact = u128::from(total) * u128::from(digits);
            let expected = exact / 1_000_000 + u128::from(exact % 1_000_000 != 0);
            prop_assert_eq!(u128::from(removal_target(total, sparsity).unwrap()), expected);
        }

        #[test]
        fn schedules_rise_evenly(total in any::<u64>(), part in any::<u64>(), shots in 1_u64..300) {
            let target = if total == u64::MAX { part } else { part % (total + 1) };
            let schedule = linear_schedule(total, target, shots).unwrap();
            prop_assert_eq!(schedule.len() as u64, shots);
            prop_assert_eq!(schedule.last().copied(), Some(target));
            for (shot, &removed) in (1_u128..).zip(&schedule) {
                // The smallest whole number r with r * shots >= target * shot.
                let (removed, shots) = (u128::from(removed), u128::from(shots));
                prop_assert!(removed * shots >= u128::from(target) * shot);
                prop_assert!(removed == 0 || (removed - 1) * shots < u128::from(target) * shot);
            }
        }
    }

    #[test]
    fn senseless_arguments_are_refused() {
        for sparsity in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
            assert!(matches!(removal_target(10, sparsity), Err(CoreError::Argument(_))));
        }
        assert_eq!(removal_target(u64::MAX, 0.0), Ok(0));
        assert!(matches!(linear_schedule(10, 5, 0), Err(CoreError::Argument(_))));
        assert!(matches!(linear_schedule(10, 5, u64::MAX), Err(CoreError::Argument(_))));
        let too_much = CoreError::Target { requested: 11, available: 10 };
        assert_eq!(linear_schedule(10, 11, 3), Err(too_much));
    }
}
