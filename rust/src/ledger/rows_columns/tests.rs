use proptest::prelude::*;

use super::*;

fn slices(masks: &[Vec<bool>]) -> Vec<&[bool]> {
    masks.iter().map(Vec::as_slice).collect()
}

fn brute(rows: &[Vec<bool>], columns: &[Vec<bool>]) -> u64 {
    let layer = |(rows, columns): (&Vec<bool>, &Vec<bool>)| {
        rows.iter().map(|&r| columns.iter().filter(|&&c| !(r && c)).count() as u64).sum::<u64>()
    };
    rows.iter().zip(columns).map(layer).sum()
}

/// Row masks and column masks of all layers.
type Shot = (Vec<Vec<bool>>, Vec<Vec<bool>>);
/// Shapes, and what stands after each shot.
type Shots = (Vec<(usize, usize)>, Vec<Shot>);

/// Shapes and, for each shot, masks that only ever lose.
fn shots() -> impl Strategy<Value = Shots> {
    prop::collection::vec((0_usize..12, 0_usize..12), 0..5).prop_flat_map(|shapes| {
        let side = |pick: fn(&(usize, usize)) -> usize| {
            let masks = shapes
                .iter()
                .map(|shape| prop::collection::vec(prop::bool::weighted(0.8), pick(shape)).boxed());
            masks.collect::<Vec<_>>()
        };
        let shot = (side(|shape| shape.0), side(|shape| shape.1));
        (Just(shapes), prop::collection::vec(shot, 0..5)).prop_map(|(shapes, mut shots)| {
            for t in 1..shots.len() {
                let (before, after) = shots.split_at_mut(t);
                let (before, after) = (&before[t - 1], &mut after[0]);
                for (old, new) in before.0.iter().zip(&mut after.0) {
                    old.iter().zip(new).for_each(|(old, new)| *new &= old);
                }
                for (old, new) in before.1.iter().zip(&mut after.1) {
                    old.iter().zip(new).for_each(|(old, new)| *new &= old);
                }
            }
            (shapes, shots)
        })
    })
}

fn book(shapes: &[(usize, usize)], shots: &[Shot]) -> Ledger {
    let shape =
        |&(rows, columns): &(usize, usize)| Shape { rows: rows as u64, columns: columns as u64 };
    let mut ledger = Ledger::new(shapes.iter().map(shape).collect()).unwrap();
    for (rows, columns) in shots {
        let before = ledger.books().removed();
        let newly = ledger.commit(&slices(rows), &slices(columns)).unwrap();
        assert_eq!(ledger.books().removed(), brute(rows, columns));
        assert_eq!(ledger.books().removed(), before + newly);
    }
    ledger
}

proptest! {
    #[test]
    fn counts_and_round_trips((shapes, shots) in shots()) {
        let ledger = book(&shapes, &shots);
        prop_assert_eq!(ledger.books().shots(), shots.len());
        let history: Vec<u64> = shots.iter().map(|(r, c)| brute(r, c)).collect();
        prop_assert_eq!(ledger.books().history(), &history[..]);
        let layers: u64 = (0..shapes.len()).map(|l| ledger.layer_removed(l).unwrap()).sum();
        prop_assert_eq!(layers, ledger.books().removed());
        prop_assert_eq!(Ledger::from_bytes(&ledger.to_bytes()), Ok(ledger));
    }

    #[test]
    fn what_went_stays_away((shapes, shots) in shots()) {
        let mut ledger = book(&shapes, &shots);
        let copy = ledger.clone();
        let everything = Ledger::new(copy.shapes.clone()).unwrap();
        let (rows, columns) = (slices(&everything.keep_rows), slices(&everything.keep_columns));
        let gone = |keep: &Vec<Vec<bool>>, kind| {
            let layers = keep.iter().enumerate();
            let first = layers.filter_map(|(l, mask)| mask.iter().position(|k| !k).map(|i| (l, kind, i)));
            first.min()
        };
        let first = [gone(&copy.keep_rows, Kind::Row), gone(&copy.keep_columns, Kind::Column)];
        match first.into_iter().flatten().min() {
            None => prop_assert_eq!(ledger.commit(&rows, &columns), Ok(0)),
            Some((layer, kind, index)) => {
                let refused = CoreError::Regrown { layer, kind, index };
                prop_assert_eq!(ledger.commit(&rows, &columns), Err(refused));
                prop_assert_eq!(ledger, copy);
            }
        }
    }

    #[test]
    fn every_damaged_byte_shows((shapes, shots) in shots(), place in any::<usize>(), flip in 1_u8..) {
        let mut bytes = book(&shapes, &shots).to_bytes();
        let place = place % bytes.len();
        bytes[place] ^= flip;
        prop_assert!(matches!(Ledger::from_bytes(&bytes), Err(CoreError::Corrupt(_))));
    }

    #[test]
    fn every_cut_shows((shapes, shots) in shots(), length in any::<usize>()) {
        let bytes = book(&shapes, &shots).to_bytes();
        let cut = &bytes[..length % bytes.len()];
        prop_assert!(matches!(Ledger::from_bytes(cut), Err(CoreError::Corrupt(_))));
    }

    #[test]
    fn no_bytes_at_all_panic(mut data in prop::collection::vec(any::<u8>(), 0..200), sealed in any::<bool>()) {
        // With a valid head and checksum the random rest reaches the inner checks.
        if sealed && data.len() >= 20 {
            data[..12].copy_from_slice(b"surgledg\x01\0\0\0");
            data[13..20].fill(0);
            data.extend_from_slice(&bytes::checksum(&data).to_le_bytes());
        }
        let _ = Ledger::from_bytes(&data);
    }
}

#[test]
fn masks_that_do_not_fit_are_refused() {
    let mut ledger = Ledger::new(vec![Shape { rows: 2, columns: 3 }]).unwrap();
    let layers = |found| CoreError::Layers { what: "keep_rows", expected: 1, found };
    assert_eq!(ledger.commit(&[], &[]), Err(layers(0)));
    let (what, expected) = ("keep_columns", 3);
    let length = CoreError::Length { layer: 0, what, expected, found: 2 };
    assert_eq!(ledger.commit(&[&[true; 2]], &[&[true; 2]]), Err(length));
    assert_eq!(ledger.layer_removed(1), Err(CoreError::NoLayer { layer: 1, layers: 1 }));
    assert_eq!(ledger.books().shots(), 0);
}

#[test]
fn impossible_sizes_are_refused() {
    let huge = Shape { rows: u64::MAX, columns: 1 };
    assert_eq!(Ledger::new(vec![huge]), Err(CoreError::Memory("the masks")));
    let huge = Shape { rows: u64::MAX, columns: 3 };
    assert_eq!(Ledger::new(vec![huge]), Err(CoreError::Overflow));
}
