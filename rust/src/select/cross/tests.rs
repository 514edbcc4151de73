use proptest::prelude::*;

use super::*;
use crate::testing::{cost, on_threads};

/// Cost and alive of each row and each column of a layer.
type Layer = (Vec<(f64, bool)>, Vec<(f64, bool)>);

fn layers() -> impl Strategy<Value = Vec<Layer>> {
    let side = || prop::collection::vec((cost(), prop::bool::weighted(0.8)), 0..8);
    prop::collection::vec((side(), side()), 0..5)
}

fn select(layers: &[Layer], kinds: Kinds, target: u64) -> Result<CrossSelection> {
    let costs = |side: &[(f64, bool)]| side.iter().map(|entry| entry.0).collect::<Vec<_>>();
    let alive = |side: &[(f64, bool)]| side.iter().map(|entry| entry.1).collect::<Vec<_>>();
    let owned: Vec<_> = layers
        .iter()
        .map(|(rows, columns)| (costs(rows), costs(columns), alive(rows), alive(columns)))
        .collect();
    let views: Vec<CrossLayer<'_>> = owned
        .iter()
        .map(|(row_costs, column_costs, alive_rows, alive_columns)| CrossLayer {
            row_costs,
            column_costs,
            alive_rows,
            alive_columns,
        })
        .collect();
    on_threads(|| select_rows_columns(&views, kinds, target))
}

/// Counts every single parameter that is gone.
fn recount(keep_rows: &[Vec<bool>], keep_columns: &[Vec<bool>]) -> u64 {
    let mut gone = 0;
    for (rows, columns) in keep_rows.iter().zip(keep_columns) {
        for row in rows {
            gone += columns.iter().filter(|&column| !(*row && *column)).count() as u64;
        }
    }
    gone
}

/// Sorts everything and removes one unit after the other, recounting each time.
fn slow(layers: &[Layer], kinds: Kinds, target: u64) -> Result<CrossSelection> {
    let alive = |side: &[(f64, bool)]| side.iter().map(|entry| entry.1).collect::<Vec<_>>();
    let mut keep = [
        layers.iter().map(|layer| alive(&layer.0)).collect::<Vec<_>>(),
        layers.iter().map(|layer| alive(&layer.1)).collect::<Vec<_>>(),
    ];
    let mut order = Vec::new();
    for (l, layer) in layers.iter().enumerate() {
        let sides = [(&layer.0, kinds.rows), (&layer.1, kinds.columns)];
        for (kind, (side, candidates)) in sides.into_iter().enumerate() {
            let entries = side.iter().enumerate().filter(|(_, entry)| candidates && entry.1);
            order.extend(entries.map(|(index, entry)| (entry.0, l, kind, index)));
        }
    }
    order.sort_by(|a, b| a.partial_cmp(b).unwrap());
    let (mut threshold, mut units_removed) = (f64::NEG_INFINITY, 0);
    for (cost, l, kind, index) in order {
        if recount(&keep[0], &keep[1]) >= target {
            break;
        }
        keep[kind][l][index] = false;
        threshold = cost;
        units_removed += 1;
    }
    let removed = recount(&keep[0], &keep[1]);
    if removed < target {
        return Err(CoreError::Target { requested: target, available: removed });
    }
    let total = layers.iter().map(|layer| (layer.0.len() * layer.1.len()) as u64).sum();
    let [keep_rows, keep_columns] = keep;
    Ok(CrossSelection { keep_rows, keep_columns, removed, total, threshold, units_removed })
}

fn kinds() -> impl Strategy<Value = Kinds> {
    (any::<bool>(), any::<bool>()).prop_map(|(rows, columns)| Kinds { rows, columns })
}

proptest! {
    #[test]
    fn equals_one_removal_after_the_other(layers in layers(), kinds in kinds(), part in 0_u64..110) {
        let total: u64 = layers.iter().map(|layer| (layer.0.len() * layer.1.len()) as u64).sum();
        let target = total * part / 100;
        prop_assert_eq!(select(&layers, kinds, target), slow(&layers, kinds, target));
    }

    #[test]
    fn a_higher_target_never_spares_more(layers in layers(), a in 0_u64..100, b in 0_u64..100) {
        let all: Vec<Layer> = layers
            .iter()
            .map(|(r, c)| (r.iter().map(|e| (e.0, true)).collect(), c.iter().map(|e| (e.0, true)).collect()))
            .collect();
        let total: u64 = all.iter().map(|layer| (layer.0.len() * layer.1.len()) as u64).sum();
        let both = Kinds { rows: true, columns: true };
        let low = select(&all, both, total * a.min(b) / 100).unwrap();
        let high = select(&all, both, total * a.max(b) / 100).unwrap();
        let pairs = low.keep_rows.iter().flatten().zip(high.keep_rows.iter().flatten());
        prop_assert!(pairs.into_iter().all(|(low, high)| low >= high));
        prop_assert!(low.threshold <= high.threshold);
    }

    #[test]
    fn names_the_first_cost_that_is_not_finite(
        mut layers in layers(),
        kinds in kinds(),
        bad in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<prop::sample::Index>()), 1..4),
    ) {
        prop_assume!(!layers.is_empty());
        for (layer, column, index) in bad {
            let layer = layer.index(layers.len());
            let side = if column { &mut layers[layer].1 } else { &mut layers[layer].0 };
            if !side.is_empty() {
                let index = index.index(side.len());
                side[index].0 = f64::INFINITY;
            }
        }
        let first = layers.iter().enumerate().find_map(|(layer, (rows, columns))| {
            let bad = |side: &[(f64, bool)]| side.iter().position(|e| e.1 && !e.0.is_finite());
            let row = bad(rows).filter(|_| kinds.rows).map(|i| (layer, Kind::Row, i));
            row.or(bad(columns).filter(|_| kinds.columns).map(|i| (layer, Kind::Column, i)))
        });
        match (select(&layers, kinds, 0), first) {
            (Err(CoreError::NonFinite { layer, kind, index, value }), Some(first)) => {
                prop_assert_eq!((layer, kind, index), first);
                prop_assert!(value.is_infinite());
            }
            (found, first) => prop_assert!(found.is_ok() && first.is_none(), "{found:?} {first:?}"),
        }
    }
}

#[test]
fn a_row_whose_columns_are_all_gone_frees_nothing_but_still_goes_in_its_turn() {
    // The column goes first and takes all of the layer; the row of equal cost would be next.
    let layers = [(vec![(1.0, true)], vec![(0.0, true)]), (vec![(1.0, true)], vec![(1.0, true)])];
    let both = Kinds { rows: true, columns: true };
    let selection = select(&layers, both, 2).unwrap();
    assert_eq!(selection.keep_rows, [[false], [false]]);
    assert_eq!(selection.keep_columns, [[false], [true]]);
    assert_eq!((selection.removed, selection.units_removed), (2, 3));
}

#[test]
fn masks_that_do_not_fit_are_refused() {
    let layer = CrossLayer {
        row_costs: &[1.0],
        column_costs: &[1.0],
        alive_rows: &[true],
        alive_columns: &[],
    };
    let both = Kinds { rows: true, columns: true };
    let what = "alive_columns";
    let length = CoreError::Length { layer: 0, what, expected: 1, found: 0 };
    assert_eq!(select_rows_columns(&[layer], both, 0), Err(length));
}
