use proptest::prelude::*;

use super::*;
use crate::ledger::Ledger;
use crate::testing::on_threads;
use crate::units::Shape;

/// What stands in each layer after a shot; any byte but 0 says that it does.
type Shot = Vec<Vec<u8>>;

/// Sizes and, for each shot, masks that only ever lose.
fn shots() -> impl Strategy<Value = (Vec<usize>, Vec<Shot>)> {
    let sizes = prop::collection::vec(prop_oneof![9 => 0_usize..40, 1 => 0_usize..3000], 0..5);
    sizes.prop_flat_map(|sizes| {
        let byte = || prop_oneof![4 => Just(1_u8), 1 => Just(0), 1 => any::<u8>()];
        let masks = sizes.iter().map(|&size| prop::collection::vec(byte(), size).boxed());
        let shot = masks.collect::<Vec<_>>();
        (Just(sizes), prop::collection::vec(shot, 0..5)).prop_map(|(sizes, mut shots)| {
            for t in 1..shots.len() {
                let (before, after) = shots.split_at_mut(t);
                let pairs = before[t - 1].iter().flatten().zip(after[0].iter_mut().flatten());
                pairs.for_each(|(before, after)| *after = if *before == 0 { 0 } else { *after });
            }
            (sizes, shots)
        })
    })
}

fn brute<'a>(mask: impl IntoIterator<Item = &'a u8>) -> u64 {
    mask.into_iter().filter(|&&byte| byte == 0).count() as u64
}

fn stage(ledger: &mut ElementLedger, shot: &Shot) {
    for (layer, mask) in shot.iter().enumerate() {
        ledger.book(layer, mask).unwrap();
    }
}

fn book(sizes: &[usize], shots: &[Shot]) -> ElementLedger {
    let mut ledger = ElementLedger::new(sizes.iter().map(|&size| size as u64).collect()).unwrap();
    for shot in shots {
        let before = ledger.clone();
        stage(&mut ledger, shot);
        assert_eq!(ledger, before, "what is staged is not booked");
        let newly = ledger.commit().unwrap();
        assert_eq!(ledger.books().removed(), brute(shot.iter().flatten()));
        assert_eq!(ledger.books().removed(), before.books().removed() + newly);
    }
    ledger
}

proptest! {
    #[test]
    fn counts_and_round_trips((sizes, shots) in shots()) {
        let ledger = on_threads(|| book(&sizes, &shots));
        prop_assert_eq!(ledger.layers(), sizes.len());
        prop_assert_eq!(ledger.books().shots(), shots.len());
        prop_assert_eq!(ledger.books().total(), sizes.iter().sum::<usize>() as u64);
        let history: Vec<u64> = shots.iter().map(|shot| brute(shot.iter().flatten())).collect();
        prop_assert_eq!(ledger.books().history(), &history[..]);
        for layer in 0..sizes.len() {
            let removed = shots.last().map_or(0, |shot| brute(&shot[layer]));
            prop_assert_eq!(ledger.layer_removed(layer), Ok(removed));
        }
        prop_assert_eq!(ElementLedger::from_bytes(&ledger.to_bytes()), Ok(ledger));
    }

    #[test]
    fn what_went_stays_away((sizes, shots) in shots()) {
        let mut ledger = book(&sizes, &shots);
        let copy = ledger.clone();
        stage(&mut ledger, &sizes.iter().map(|&size| vec![1; size]).collect());
        match copy.removed.iter().position(|&removed| removed > 0) {
            None => prop_assert_eq!(ledger.commit(), Ok(0)),
            Some(layer) => {
                let before = copy.removed[layer];
                prop_assert_eq!(ledger.commit(), Err(CoreError::Fewer { layer, before, after: 0 }));
                prop_assert_eq!(&ledger, &copy);
                prop_assert_eq!(ledger.staged, copy.staged);
            }
        }
    }

    #[test]
    fn every_layer_is_booked_once((sizes, shots) in shots(), place in any::<prop::sample::Index>()) {
        prop_assume!(!sizes.is_empty() && !shots.is_empty());
        let (last, before) = shots.split_last().unwrap();
        let mut ledger = book(&sizes, before);
        let copy = ledger.clone();
        let layer = place.index(sizes.len());
        for other in (0..sizes.len()).filter(|&other| other != layer) {
            ledger.book(other, &last[other]).unwrap();
            prop_assert_eq!(ledger.book(other, &last[other]), Err(CoreError::Twice { layer: other }));
        }
        prop_assert_eq!(ledger.commit(), Err(CoreError::Unbooked { layer }));
        prop_assert_eq!(&ledger, &copy);
        // The refused shot left nothing behind.
        stage(&mut ledger, last);
        let newly = brute(last.iter().flatten()) - copy.books().removed();
        prop_assert_eq!(ledger.commit(), Ok(newly));
    }

    #[test]
    fn every_damaged_byte_shows((sizes, shots) in shots(), place in any::<usize>(), flip in 1_u8..) {
        let mut bytes = book(&sizes, &shots).to_bytes();
        let place = place % bytes.len();
        bytes[place] ^= flip;
        prop_assert!(matches!(ElementLedger::from_bytes(&bytes), Err(CoreError::Corrupt(_))));
    }

    #[test]
    fn every_cut_shows((sizes, shots) in shots(), length in any::<usize>()) {
        let bytes = book(&sizes, &shots).to_bytes();
        let cut = &bytes[..length % bytes.len()];
        prop_assert!(matches!(ElementLedger::from_bytes(cut), Err(CoreError::Corrupt(_))));
    }

    #[test]
    fn no_bytes_at_all_panic(mut data in prop::collection::vec(any::<u8>(), 0..200), sealed in any::<bool>()) {
        // With a valid head and checksum the random rest reaches the inner checks.
        if sealed && data.len() >= 20 {
            data[..12].copy_from_slice(b"surgelem\x01\0\0\0");
            data[13..20].fill(0);
            data.extend_from_slice(&bytes::checksum(&data).to_le_bytes());
        }
        let _ = ElementLedger::from_bytes(&data);
    }
}

#[test]
fn contradictions_are_refused() {
    let read = |layers: &[[u64; 2]], history: &[u64]| {
        let bytes = bytes::write(Booked::Elements, layers, history, iter::empty());
        ElementLedger::from_bytes(&bytes).map(|ledger| ledger.books().removed())
    };
    assert_eq!(read(&[[3, 1], [2, 2]], &[2, 3]), Ok(3));
    let refused = |why| Err(CoreError::Corrupt(why));
    assert_eq!(read(&[[3, 4]], &[4]), refused("a layer has lost more than it had"));
    assert_eq!(read(&[[u64::MAX, 0], [1, 0]], &[]), refused("its layers are too large"));
    assert_eq!(read(&[[3, 1]], &[2, 1]), refused("its history contradicts its layers"));
    assert_eq!(read(&[[3, 1]], &[2]), refused("its history contradicts its layers"));
    assert_eq!(read(&[[3, 1]], &[]), refused("its history contradicts its layers"));
    let masks = iter::once((&[true][..], &[][..]));
    let bytes = bytes::write(Booked::Elements, &[[3, 0]], &[], masks);
    let refused = CoreError::Corrupt("something follows its end");
    assert_eq!(ElementLedger::from_bytes(&bytes), Err(refused));
}

#[test]
fn the_two_kinds_of_ledger_refuse_each_other() {
    let (elements, matrices) = ("single elements", "rows and columns");
    let matrix = Ledger::new(vec![Shape { rows: 2, columns: 3 }]).unwrap();
    let other = CoreError::OtherLedger { expected: elements, found: matrices };
    assert_eq!(ElementLedger::from_bytes(&matrix.to_bytes()), Err(other));
    let ledger = ElementLedger::new(vec![6]).unwrap();
    let other = CoreError::OtherLedger { expected: matrices, found: elements };
    assert_eq!(Ledger::from_bytes(&ledger.to_bytes()), Err(other));
}

#[test]
fn masks_that_do_not_fit_are_refused() {
    let mut ledger = ElementLedger::new(vec![2, 0]).unwrap();
    let length = CoreError::Length { layer: 0, what: "keep", expected: 2, found: 3 };
    assert_eq!(ledger.book(0, &[1; 3]), Err(length));
    assert_eq!(ledger.book(2, &[]), Err(CoreError::NoLayer { layer: 2, layers: 2 }));
    assert_eq!(ledger.layer_removed(2), Err(CoreError::NoLayer { layer: 2, layers: 2 }));
    assert_eq!(ElementLedger::new(vec![u64::MAX, 1]), Err(CoreError::Overflow));
}

#[test]
fn no_layers_at_all() {
    let mut ledger = ElementLedger::new(vec![]).unwrap();
    assert_eq!(ledger.commit(), Ok(0));
    assert_eq!((ledger.books().shots(), ledger.books().sparsity()), (1, 0.0));
}
