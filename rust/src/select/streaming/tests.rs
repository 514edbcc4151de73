use proptest::prelude::*;

use super::*;
use crate::testing::{cost, on_threads};

type Stream = Vec<Vec<(f64, bool)>>;

/// Layers of costs: long ones, short ones, many ties, close neighbours.
fn stream() -> impl Strategy<Value = Stream> {
    let close = (0_u64..2000).prop_map(|step| f64::from_bits(1.5_f64.to_bits() + step));
    let close32 = (0_u32..2000).prop_map(|step| f64::from(f32::from_bits(0x3f80_0000 + step)));
    let element = prop_oneof![2 => cost(), 2 => close, 2 => close32, 1 => Just(7.0)];
    let layer = prop::collection::vec((element, prop::bool::weighted(0.9)), 0..700);
    prop::collection::vec(layer, 1..5)
}

fn short(cost: f64) -> f32 {
    #[allow(clippy::cast_possible_truncation)]
    let short = cost as f32;
    // Two of the costs have no finite or no non-zero counterpart.
    if short.is_finite() { short } else { f32::MAX }
}

fn columns<T>(stream: &Stream, to: impl Fn(f64) -> T) -> (Vec<Vec<T>>, Vec<Vec<bool>>) {
    let costs = |layer: &Vec<(f64, bool)>| layer.iter().map(|e| to(e.0)).collect();
    let alive = |layer: &Vec<(f64, bool)>| layer.iter().map(|e| e.1).collect();
    (stream.iter().map(costs).collect(), stream.iter().map(alive).collect())
}

fn find<T: Cost>(
    costs: &[Vec<T>],
    alive: Option<&[Vec<bool>]>,
    rank: u64,
) -> Result<(Threshold, u64)> {
    let mut quantile = CostQuantile::new(rank);
    loop {
        for (layer, costs) in costs.iter().enumerate() {
            quantile.update(layer, costs, alive.map(|alive| &alive[layer][..]))?;
        }
        if quantile.finish_pass()? {
            return Ok((quantile.result().unwrap(), quantile.passes()));
        }
    }
}

/// Checks threshold and masks against a full sort of (cost, layer, index).
fn check<T: Cost>(costs: &[Vec<T>], alive: Option<&[Vec<bool>]>, rank: u64) {
    let mut order: Vec<(f64, usize, usize)> = Vec::new();
    for (l, layer) in costs.iter().enumerate() {
        for (i, cost) in layer.iter().enumerate() {
            if alive.is_none_or(|alive| alive[l][i]) {
                order.push((cost.widen(), l, i));
            }
        }
    }
    order.sort_by(|a, b| a.partial_cmp(b).unwrap());
    let count = order.len() as u64;
    let found = on_threads(|| find(costs, alive, rank));
    if rank > count {
        assert_eq!(found, Err(CoreError::Target { requested: rank, available: count }));
        return;
    }
    let (threshold, passes) = found.unwrap();
    let cost = if rank == 0 { f64::NEG_INFINITY } else { order[rank as usize - 1].0 };
    let below = order.iter().filter(|entry| entry.0 < cost).count() as u64;
    assert_eq!(threshold, Threshold { cost, below, ties: rank - below, count });
    assert!(cost != 0.0 || threshold.cost.is_sign_positive(), "the threshold is never -0.0");
    assert!(passes <= u64::from(T::DIGITS));

    let mut expected: Vec<Vec<bool>> = match alive {
        Some(alive) => alive.to_vec(),
        None => costs.iter().map(|layer| vec![true; layer.len()]).collect(),
    };
    for &(_, l, i) in &order[..rank as usize] {
        expected[l][i] = false;
    }
    let mut ties_left = threshold.ties;
    for (l, costs) in costs.iter().enumerate() {
        let alive = alive.map(|alive| &alive[l][..]);
        let (keep, left) =
            on_threads(|| element_mask(l, costs, alive, &threshold, ties_left)).unwrap();
        assert_eq!(keep, expected[l]);
        ties_left = left;
    }
    assert_eq!(ties_left, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn equals_a_full_sort(stream in stream(), part in 0_u64..=102, masked in any::<bool>()) {
        let (long, alive) = columns(&stream, |cost| cost);
        let (shorts, _) = columns(&stream, short);
        let alive = masked.then_some(&alive[..]);
        let count = stream.iter().flatten().filter(|e| !masked || e.1).count() as u64;
        let rank = (count * part).div_ceil(100);
        check(&long, alive, rank);
        check(&shorts, alive, rank);
    }

    #[test]
    fn names_the_first_cost_that_is_not_finite(
        stream in stream(),
        bad in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY]),
        pass in 0..2,
        masked in any::<bool>(),
    ) {
        let places: Vec<(usize, usize)> = stream
            .iter()
            .enumerate()
            .flat_map(|(l, layer)| (0..layer.len()).map(move |i| (l, i)))
            .collect();
        prop_assume!(!places.is_empty());
        let (costs, alive) = columns(&stream, |cost| cost);
        let count = stream.iter().flatten().filter(|e| !masked || e.1).count() as u64;
        prop_assume!(count > 0);
        let (layer, index) = *bad.get(&places);
        let mut spoilt = costs[layer].clone();
        spoilt[index] = value;
        let alive = |l: usize| masked.then_some(&alive[l][..]);

        let mut quantile = CostQuantile::new(count.div_ceil(2));
        let feed = |quantile: &mut CostQuantile| {
            costs.iter().enumerate().try_for_each(|(l, costs)| quantile.update(l, costs, alive(l)))
        };
        if pass == 1 {
            feed(&mut quantile).unwrap();
            prop_assert_eq!(quantile.finish_pass(), Ok(false));
        }
        let outcome = quantile.update(layer, &spoilt, alive(layer));
        if alive(layer).is_none_or(|alive| alive[index]) {
            let Err(CoreError::NonFinite { layer: l, kind: Kind::Element, index: i, .. }) = outcome else {
                panic!("{outcome:?}");
            };
            prop_assert_eq!((l, i), (layer, index));
            // The pass starts over as if nothing had happened.
            loop {
                feed(&mut quantile).unwrap();
                if quantile.finish_pass().unwrap() {
                    break;
                }
            }
            let whole = masked.then(|| columns(&stream, |cost| cost).1);
            let expected = find(&costs, whole.as_deref(), count.div_ceil(2)).unwrap();
            prop_assert_eq!((quantile.result().unwrap(), quantile.passes()), expected);
        } else {
            prop_assert_eq!(outcome, Ok(()));
        }
        let threshold = Threshold { cost: 1.0, below: 0, ties: 3, count };
        let mask = on_threads(|| element_mask(layer, &spoilt, alive(layer), &threshold, 3).is_ok());
        prop_assert_eq!(mask, alive(layer).is_some_and(|alive| !alive[index]));
    }
}

#[test]
fn a_stream_that_changes_between_passes_is_refused() {
    let layer: Vec<f64> = (0..500).map(f64::from).collect();
    let mut quantile = CostQuantile::new(250);
    quantile.update(0, &layer, None).unwrap();
    assert_eq!(quantile.finish_pass(), Ok(false));
    quantile.update(0, &layer[1..], None).unwrap();
    assert!(matches!(quantile.finish_pass(), Err(CoreError::Argument(_))));
    quantile.update(0, &vec![0.0; 500], None).unwrap();
    assert!(matches!(quantile.finish_pass(), Err(CoreError::Argument(_))));
    quantile.update(0, &vec![250.0; 500], None).unwrap();
    assert!(matches!(quantile.finish_pass(), Err(CoreError::Argument(_))));
    while !{
        quantile.update(0, &layer, None).unwrap();
        quantile.finish_pass().unwrap()
    } {}
    assert_eq!(quantile.result().map(|threshold| threshold.cost), Some(249.0));
    assert!(matches!(quantile.update(0, &layer, None), Err(CoreError::Argument(_))));
    assert_eq!(quantile.finish_pass(), Ok(true));
}

#[test]
fn types_do_not_mix_and_masks_must_fit() {
    let mut quantile = CostQuantile::new(1);
    quantile.update(0, &[1.0_f32], None).unwrap();
    assert!(matches!(quantile.update(1, &[1.0_f64], None), Err(CoreError::Argument(_))));
    let length = CoreError::Length { layer: 1, what: "alive", expected: 1, found: 0 };
    assert_eq!(quantile.update(1, &[1.0_f32], Some(&[])), Err(length.clone()));
    let threshold = Threshold { cost: 1.0, below: 0, ties: 0, count: 1 };
    assert_eq!(element_mask(1, &[1.0_f32], Some(&[]), &threshold, 0), Err(length));
}

#[test]
fn an_empty_stream_has_rank_zero_only() {
    let mut quantile = CostQuantile::new(0);
    assert_eq!(quantile.finish_pass(), Ok(true));
    assert_eq!(quantile.result().map(|threshold| threshold.count), Some(0));
    let none = CoreError::Target { requested: 1, available: 0 };
    assert_eq!(CostQuantile::new(1).finish_pass(), Err(none));
}
