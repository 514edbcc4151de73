//! Throughput of the selection core, without Python.
//!
//! `cargo bench` runs it; elements are candidates or costs.

use std::hint::black_box;

use _core::ledger::Ledger;
use _core::nm::{Pattern, nm_mask};
use _core::select::cross::{CrossLayer, Kinds, select_rows_columns};
use _core::select::independent::{Rank, UnitLayer, select_units};
use _core::select::streaming::{Cost, CostQuantile, Threshold, element_mask};
use _core::units::Shape;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const ELEMENTS: usize = 1 << 22;
const LAYERS: usize = 64;

/// Costs spread over many orders of magnitude, as curvature makes them.
fn costs(count: usize, mut state: u64) -> Vec<f64> {
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        #[allow(clippy::cast_precision_loss)]
        let uniform = (state >> 11) as f64 / (1_u64 << 53) as f64;
        uniform
    };
    (0..count).map(|_| (12.0 * (next() + next() + next() - 1.5)).exp()).collect()
}

fn layers(per_layer: usize) -> Vec<Vec<f64>> {
    (0..LAYERS as u64).map(|layer| costs(per_layer, 0x9E37_79B9 + layer)).collect()
}

fn units(c: &mut Criterion) {
    let side = 4096;
    let (rows, columns) = (layers(side), layers(side));
    let (alive, sizes) = (vec![true; side], vec![128_u64; side]);
    let matrices: Vec<CrossLayer<'_>> = rows
        .iter()
        .zip(&columns)
        .map(|(row_costs, column_costs)| CrossLayer {
            row_costs,
            column_costs,
            alive_rows: &alive,
            alive_columns: &alive,
        })
        .collect();
    let half = (LAYERS * side * side / 2) as u64;
    let both = Kinds { rows: true, columns: true };
    let mut group = c.benchmark_group("units");
    group.throughput(Throughput::Elements((2 * LAYERS * side) as u64));
    group.bench_function("rows and columns", |b| {
        b.iter(|| select_rows_columns(black_box(&matrices), both, half).unwrap());
    });
    let groups: Vec<UnitLayer<'_>> = rows
        .iter()
        .map(|costs| UnitLayer { costs, sizes: &sizes, alive: &alive, bonus: 0 })
        .collect();
    let half = (LAYERS * side * 128 / 2) as u64;
    group.throughput(Throughput::Elements((LAYERS * side) as u64));
    for (name, rank) in [("by cost", Rank::Cost), ("per parameter", Rank::CostPerParameter)] {
        group.bench_function(name, |b| {
            b.iter(|| select_units(black_box(&groups), rank, half).unwrap());
        });
    }
    group.finish();
}

fn quantile<T: Cost>(layers: &[Vec<T>]) -> Threshold {
    let mut quantile = CostQuantile::new(ELEMENTS as u64 / 2);
    loop {
        for (layer, costs) in layers.iter().enumerate() {
            quantile.update(layer, costs, None).unwrap();
        }
        if quantile.finish_pass().unwrap() {
            return quantile.result().unwrap();
        }
    }
}

fn elements(c: &mut Criterion) {
    let long = layers(ELEMENTS / LAYERS);
    #[allow(clippy::cast_possible_truncation)]
    let short: Vec<Vec<f32>> =
        long.iter().map(|layer| layer.iter().map(|&cost| cost as f32).collect()).collect();
    let threshold = quantile(&short);
    let mut group = c.benchmark_group("elements");
    group.throughput(Throughput::Elements(ELEMENTS as u64));
    group.bench_function("threshold f32", |b| b.iter(|| quantile(black_box(&short))));
    group.bench_function("threshold f64", |b| b.iter(|| quantile(black_box(&long))));
    group.bench_function("mask f32", |b| {
        b.iter(|| {
            for (layer, costs) in short.iter().enumerate() {
                black_box(element_mask(layer, costs, None, &threshold, threshold.ties).unwrap());
            }
        });
    });
    for (keep, of) in [(1, 2), (2, 4), (4, 8), (8, 16), (3, 5)] {
        let pattern = Pattern::new(keep, of).unwrap();
        group.bench_function(format!("{keep}:{of} f32"), |b| {
            b.iter(|| {
                for costs in &short {
                    black_box(nm_mask(costs, 4096, 4096, pattern).unwrap());
                }
            });
        });
    }
    group.finish();
}

fn ledger(c: &mut Criterion) {
    let shape = Shape { rows: 4096, columns: 4096 };
    let ledger = Ledger::new(vec![shape; LAYERS]).unwrap();
    let bytes = ledger.to_bytes();
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements((2 * LAYERS * 4096) as u64));
    group.bench_function("to bytes", |b| b.iter(|| black_box(&ledger).to_bytes()));
    group.bench_function("from bytes", |b| b.iter(|| Ledger::from_bytes(black_box(&bytes))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = units, elements, ledger
}
criterion_main!(benches);
