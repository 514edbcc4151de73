//! What the tests of several modules share.

use std::fmt::Debug;

use proptest::prelude::*;
use rayon::ThreadPoolBuilder;

/// Costs with many ties, both zeros and small negative values.
pub(crate) fn cost() -> impl Strategy<Value = f64> {
    prop_oneof![
        3 => (0_i8..6).prop_map(f64::from),
        1 => prop::sample::select(vec![0.0, -0.0, -1e-12, 5e-324, 1e300, -2.0]),
        2 => 0.0_f64..1.0,
    ]
}

/// The result of `work`, which must not depend on the number of threads.
pub(crate) fn on_threads<T: Send + PartialEq + Debug>(work: impl Fn() -> T + Sync) -> T {
    let run = |threads| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&work)
    };
    let result = run(1);
    for threads in [2, 7] {
        assert_eq!(result, run(threads), "{threads} threads");
    }
    result
}
