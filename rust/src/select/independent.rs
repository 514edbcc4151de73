//! Independent units, each with a size of its own, under one threshold.
//!
//! Heads, neurons, blocks, groups: whatever frees parameters that nothing else frees.

use rayon::prelude::*;

use super::search::{Crossing, Group, Sized, crossing};
use crate::error::{CoreError, Result};
use crate::units::{Kind, cost_of_key, expect_length, order_key};

/// The units of one layer.
#[derive(Debug, Clone, Copy)]
pub struct UnitLayer<'a> {
    /// Cost of each unit. Read at alive units only.
    pub costs: &'a [f64],
    /// Parameters that each unit frees.
    pub sizes: &'a [u64],
    /// False for units that are gone already.
    pub alive: &'a [bool],
    /// Parameters freed in addition when no unit is left, such as a key/value head that goes with
    /// the last of its query heads. 0 if there are none.
    pub bonus: u64,
}

/// What units are ranked by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rank {
    /// By cost.
    Cost,
    /// By cost divided by size, in `f64`.
    CostPerParameter,
}

/// What goes and what stays.
#[derive(Debug, Clone, PartialEq)]
pub struct UnitSelection {
    /// For each layer: false for units that are dead or go now.
    pub keep: Vec<Vec<bool>>,
    /// Parameters removed, dead units included.
    pub removed: u64,
    /// The largest score that went, `-inf` if none did.
    pub threshold: f64,
    /// Units that go now.
    pub units_removed: u64,
}

impl Rank {
    #[allow(clippy::cast_precision_loss)]
    fn key(self, cost: f64, size: u64) -> u64 {
        order_key(match self {
            Self::Cost => cost,
            Self::CostPerParameter => cost / size as f64,
        })
    }
}

impl UnitLayer<'_> {
    /// Cost and size of the alive units, with their places.
    fn candidates(&self) -> impl Iterator<Item = (usize, f64, u64)> {
        let units = self.costs.iter().zip(self.sizes).zip(self.alive).enumerate();
        units
            .filter(|(_, (_, alive))| **alive)
            .map(|(index, ((&cost, &size), _))| (index, cost, size))
    }

    /// Records of the candidates, or why there are none.
    fn records(&self, layer: usize, rank: Rank) -> Result<Vec<Sized>> {
        expect_length(layer, "sizes", self.costs.len(), self.sizes.len())?;
        expect_length(layer, "alive", self.costs.len(), self.alive.len())?;
        let mut records = Vec::with_capacity(self.costs.len());
        for (index, cost, size) in self.candidates() {
            if !cost.is_finite() {
                return Err(CoreError::NonFinite { layer, kind: Kind::Unit, index, value: cost });
            }
            if size == 0 && rank == Rank::CostPerParameter {
                return Err(CoreError::Argument(format!(
                    "unit {index} of layer {layer} frees no parameter, so it has no cost per parameter"
                )));
            }
            if size == 0 && self.bonus > 0 {
                return Err(CoreError::Argument(format!(
                    "unit {index} of layer {layer} frees no parameter, so the layer can have no bonus"
                )));
            }
            records.push(Sized { key: rank.key(cost, size), size });
        }
        Ok(records)
    }

    /// Parameters of the dead units, with the bonus if all are dead; `None` if they do not fit 64
    /// bits.
    fn dead(&self) -> Option<u64> {
        let dead = self.sizes.iter().zip(self.alive).filter(|(_, alive)| !**alive);
        let bonus = if self.alive.contains(&true) { 0 } else { self.bonus };
        dead.map(|(size, _)| *size).try_fold(bonus, u64::checked_add)
    }

    /// Keep mask if all keys below `key` go, and those equal to it before index `cut`.
    fn mask(&self, rank: Rank, key: u64, cut: usize) -> Vec<bool> {
        let mut keep = vec![false; self.costs.len()];
        for (index, cost, size) in self.candidates() {
            let own = rank.key(cost, size);
            keep[index] = own > key || (own == key && index >= cut);
        }
        keep
    }
}

/// What the candidates of one layer free. None of them has size 0 if there is a bonus, so the
/// sizes that went tell whether all went.
struct Freed {
    /// Sizes of all candidates together.
    sizes: u64,
    /// What comes on top when all went; 0 without candidates, whose bonus is dead already.
    bonus: u64,
}

impl Freed {
    fn new(units: &UnitLayer<'_>, group: &Group<Sized>) -> Option<Self> {
        let bonus = if group.len() == 0 { 0 } else { units.bonus };
        Some(Self { sizes: group.weight()?, bonus })
    }

    /// Parameters of all candidates; `None` if they do not fit 64 bits.
    fn all(&self) -> Option<u64> {
        self.sizes.checked_add(self.bonus)
    }

    /// Parameters freed by candidates whose sizes sum to `gone`.
    fn by(&self, gone: u64) -> u64 {
        gone + if gone == self.sizes { self.bonus } else { 0 }
    }
}

/// Removes the cheapest units of all layers until `target` parameters are gone.
///
/// `target` counts what is gone in total, dead units included: if they reach it alone, nothing
/// more goes. The result is the shortest prefix of the order (score, layer, index) that reaches
/// the target, with the bonus of every layer in which nothing is left. The order does not look at
/// the bonus. A layer without alive units has lost its bonus from the start. Expected time O(n), memory O(n) for n units.
///
/// # Errors
/// [`CoreError::NonFinite`] for the first candidate, in the order of layers, whose cost is NaN or
/// infinite; [`CoreError::Argument`] for a candidate of size 0 ranked per parameter
/// or in a layer with a bonus; [`CoreError::Target`] if all units together are not enough;
/// [`CoreError::Length`] if the arrays of a layer differ in length; [`CoreError::Overflow`] if
/// sizes and bonuses do not fit 64 bits together.
///
/// ```
/// use _core::select::independent::{Rank, UnitLayer, select_units};
///
/// let layer = UnitLayer { costs: &[3.0, 2.0, 8.0], sizes: &[9, 1, 9], alive: &[true; 3], bonus: 5 };
/// let selection = select_units(&[layer], Rank::Cost, 2)?;
/// assert_eq!(selection.keep, [[false, false, true]]);
/// let selection = select_units(&[layer], Rank::CostPerParameter, 2)?;
/// assert_eq!(selection.keep, [[false, true, true]]);
/// assert_eq!(select_units(&[layer], Rank::Cost, 20)?.removed, 9 + 1 + 9 + 5);
/// # Ok::<(), _core::CoreError>(())
/// ```
pub fn select_units(layers: &[UnitLayer<'_>], rank: Rank, target: u64) -> Result<UnitSelection> {
    let records: Vec<Result<Vec<Sized>>> =
        layers.par_iter().enumerate().map(|(layer, units)| units.records(layer, rank)).collect();
    let mut groups = Vec::with_capacity(layers.len());
    for records in records {
        groups.push(Group::new(records?));
    }
    let dead = layers.iter().map(UnitLayer::dead);
    let dead = dead.fold(Some(0), sum).ok_or(CoreError::Overflow)?;
    let freed: Option<Vec<Freed>> =
        layers.iter().zip(&groups).map(|(units, group)| Freed::new(units, group)).collect();
    let freed = freed.ok_or(CoreError::Overflow)?;
    let available = freed.iter().map(Freed::all).fold(Some(dead), sum);
    let available = available.ok_or(CoreError::Overflow)?;

    if dead >= target {
        return Ok(UnitSelection {
            keep: layers.iter().map(|units| units.alive.to_vec()).collect(),
            removed: dead,
            threshold: f64::NEG_INFINITY,
            units_removed: 0,
        });
    }
    if available < target {
        return Err(CoreError::Target { requested: target, available });
    }
    let count = |gone: &[u64]| -> u64 {
        dead + freed.iter().zip(gone).map(|(freed, &gone)| freed.by(gone)).sum::<u64>()
    };
    let found = crossing(&mut groups, target, count);
    drop(groups);

    let mut removed = count(&found.below);
    let mut units_removed = found.count.iter().sum::<usize>() as u64;
    let mut cuts = vec![0; layers.len()];
    for (layer, units) in layers.iter().enumerate() {
        if found.ties[layer] == 0 || removed >= target {
            continue;
        }
        let mut gone = found.below[layer];
        let ties = units.candidates().filter(|&(_, cost, size)| rank.key(cost, size) == found.key);
        for (index, _, size) in ties {
            if removed >= target {
                break;
            }
            removed += freed[layer].by(gone + size) - freed[layer].by(gone);
            gone += size;
            units_removed += 1;
            cuts[layer] = index + 1;
        }
    }
    let Crossing { key, .. } = found;
    let keep = layers.par_iter().zip(cuts).map(|(units, cut)| units.mask(rank, key, cut)).collect();
    Ok(UnitSelection { keep, removed, threshold: cost_of_key(key), units_removed })
}

fn sum(all: Option<u64>, part: Option<u64>) -> Option<u64> {
    all?.checked_add(part?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{cost, on_threads};

    /// Cost, size and life of each unit.
    type Units = Vec<Vec<(f64, u64, bool)>>;

    fn units() -> impl Strategy<Value = Units> {
        let unit = (cost(), 1_u64..6, prop::bool::weighted(0.8));
        prop::collection::vec(prop::collection::vec(unit, 0..12), 0..5)
    }

    /// Few units a layer, so that layers often go as a whole, and a bonus for each.
    fn units_with_bonus() -> impl Strategy<Value = (Units, Vec<u64>)> {
        let unit = (cost(), 1_u64..6, prop::bool::weighted(0.8));
        let bonus = prop_oneof![Just(0), 1_u64..30];
        let layer = (prop::collection::vec(unit, 0..5), bonus);
        prop::collection::vec(layer, 0..8).prop_map(|layers| layers.into_iter().unzip())
    }

    fn select(units: &Units, rank: Rank, target: u64) -> Result<UnitSelection> {
        select_bonus(units, &vec![0; units.len()], rank, target)
    }

    fn select_bonus(
        units: &Units,
        bonus: &[u64],
        rank: Rank,
        target: u64,
    ) -> Result<UnitSelection> {
        let column = |pick: fn(&(f64, u64, bool)) -> f64| -> Vec<Vec<f64>> {
            units.iter().map(|layer| layer.iter().map(pick).collect()).collect()
        };
        let costs = column(|unit| unit.0);
        let sizes: Vec<Vec<u64>> =
            units.iter().map(|layer| layer.iter().map(|unit| unit.1).collect()).collect();
        let alive: Vec<Vec<bool>> =
            units.iter().map(|layer| layer.iter().map(|unit| unit.2).collect()).collect();
        let layers: Vec<UnitLayer<'_>> = (0..units.len())
            .map(|l| UnitLayer {
                costs: &costs[l],
                sizes: &sizes[l],
                alive: &alive[l],
                bonus: bonus[l],
            })
            .collect();
        on_threads(|| select_units(&layers, rank, target))
    }

    /// Sorts everything and removes one unit after the other.
    fn slow(units: &Units, bonus: &[u64], rank: Rank, target: u64) -> Result<UnitSelection> {
        let mut keep: Vec<Vec<bool>> =
            units.iter().map(|layer| layer.iter().map(|unit| unit.2).collect()).collect();
        let removed = |keep: &Vec<Vec<bool>>| -> u64 {
            let pairs = units.iter().flatten().zip(keep.iter().flatten());
            let sizes: u64 = pairs.filter(|(_, keep)| !**keep).map(|(unit, _)| unit.1).sum();
            let empty = keep.iter().zip(bonus).filter(|(keep, _)| keep.iter().all(|keep| !keep));
            sizes + empty.map(|(_, bonus)| bonus).sum::<u64>()
        };
        let mut order: Vec<(f64, usize, usize)> = Vec::new();
        for (l, layer) in units.iter().enumerate() {
            for (i, &(cost, size, alive)) in layer.iter().enumerate() {
                #[allow(clippy::cast_precision_loss)]
                let score = if rank == Rank::Cost { cost } else { cost / size as f64 };
                if alive {
                    order.push((score, l, i));
                }
            }
        }
        order.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let (mut threshold, mut units_removed) = (f64::NEG_INFINITY, 0);
        for (score, l, i) in order {
            if removed(&keep) >= target {
                break;
            }
            keep[l][i] = false;
            threshold = score;
            units_removed += 1;
        }
        let removed = removed(&keep);
        if removed < target {
            return Err(CoreError::Target { requested: target, available: removed });
        }
        Ok(UnitSelection { keep, removed, threshold, units_removed })
    }

    proptest! {
        #[test]
        fn equals_one_removal_after_the_other(units in units(), part in 0_u64..110, each in any::<bool>()) {
            let total: u64 = units.iter().flatten().map(|unit| unit.1).sum();
            let rank = if each { Rank::CostPerParameter } else { Rank::Cost };
            let target = total * part / 100;
            prop_assert_eq!(select(&units, rank, target), slow(&units, &vec![0; units.len()], rank, target));
        }

        #[test]
        fn the_last_unit_of_a_layer_takes_the_bonus_along(
            (units, bonus) in units_with_bonus(),
            part in 0_u64..110,
            each in any::<bool>(),
        ) {
            let total: u64 = units.iter().flatten().map(|unit| unit.1).chain(bonus.iter().copied()).sum();
            let rank = if each { Rank::CostPerParameter } else { Rank::Cost };
            let target = total * part / 100;
            let found = select_bonus(&units, &bonus, rank, target);
            prop_assert_eq!(found, slow(&units, &bonus, rank, target));
        }

        #[test]
        fn names_the_first_cost_that_is_not_finite(mut units in units(), bad in any::<prop::sample::Index>()) {
            let places: Vec<(usize, usize)> = units
                .iter()
                .enumerate()
                .flat_map(|(l, layer)| (0..layer.len()).map(move |i| (l, i)))
                .collect();
            prop_assume!(!places.is_empty());
            let (layer, index) = *bad.get(&places);
            units[layer][index].0 = f64::NEG_INFINITY;
            units.last_mut().unwrap().push((f64::NAN, 1, false));
            let found = select(&units, Rank::Cost, 0);
            if units[layer][index].2 {
                let value = f64::NEG_INFINITY;
                prop_assert_eq!(found, Err(CoreError::NonFinite { layer, kind: Kind::Unit, index, value }));
            } else {
                prop_assert!(found.is_ok());
            }
        }
    }

    #[test]
    fn senseless_units_are_refused() {
        let free = vec![vec![(1.0, 0, true)]];
        assert_eq!(select(&free, Rank::Cost, 0).map(|s| s.removed), Ok(0));
        assert!(matches!(select(&free, Rank::CostPerParameter, 0), Err(CoreError::Argument(_))));
        let dead = vec![vec![(1.0, 0, false)]];
        assert!(select(&dead, Rank::CostPerParameter, 0).is_ok());
        for alive in [true, false] {
            let huge = vec![vec![(1.0, u64::MAX, alive), (1.0, 1, true)], vec![(1.0, 1, alive)]];
            assert_eq!(select(&huge, Rank::Cost, 1), Err(CoreError::Overflow));
        }
        for alive in [true, false] {
            let one = vec![vec![(1.0, 1, alive)]];
            let overflow = select_bonus(&one, &[u64::MAX], Rank::Cost, 1);
            assert_eq!(overflow, Err(CoreError::Overflow));
        }
        let found = select_bonus(&free, &[1], Rank::Cost, 0);
        assert!(matches!(found, Err(CoreError::Argument(_))));
        assert_eq!(select_bonus(&dead, &[1], Rank::Cost, 1).map(|s| s.removed), Ok(1));
        assert_eq!(select_bonus(&vec![vec![]], &[3], Rank::Cost, 3).map(|s| s.removed), Ok(3));
        let layer = UnitLayer { costs: &[1.0], sizes: &[], alive: &[true], bonus: 0 };
        let length = CoreError::Length { layer: 0, what: "sizes", expected: 1, found: 0 };
        assert_eq!(select_units(&[layer], Rank::Cost, 1), Err(length));
    }
}
