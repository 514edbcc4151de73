//! Selection over units, and the targets it works towards.

use pyo3::prelude::*;
use pyo3::types::PyList;

use super::arrays::{mask_list, masks, vectors};
use super::count;
use crate::select::{cross, independent};
use crate::units::expect_layers;

/// Rows and columns that stay and go.
#[pyclass(frozen, module = "surgeon._core")]
pub(super) struct CrossSelection {
    #[pyo3(get)]
    keep_rows: Py<PyList>,
    #[pyo3(get)]
    keep_columns: Py<PyList>,
    #[pyo3(get)]
    removed: u64,
    #[pyo3(get)]
    total: u64,
    #[pyo3(get)]
    threshold: f64,
    #[pyo3(get)]
    units_removed: u64,
}

#[pymethods]
impl CrossSelection {
    fn __repr__(&self) -> String {
        let Self { removed, total, threshold, units_removed, .. } = self;
        format!(
            "CrossSelection(removed={removed}, total={total}, threshold={threshold:?}, \
             units_removed={units_removed})"
        )
    }
}

/// Removes the cheapest rows and columns of all layers until `target` parameters are gone.
#[pyfunction]
#[pyo3(signature = (row_costs, column_costs, alive_rows, alive_columns, target, *, rows=true, columns=true))]
#[allow(clippy::too_many_arguments)]
pub(super) fn select_rows_columns<'py>(
    py: Python<'py>,
    row_costs: Vec<Bound<'py, PyAny>>,
    column_costs: Vec<Bound<'py, PyAny>>,
    alive_rows: Vec<Bound<'py, PyAny>>,
    alive_columns: Vec<Bound<'py, PyAny>>,
    target: &Bound<'py, PyAny>,
    rows: bool,
    columns: bool,
) -> PyResult<CrossSelection> {
    let target = count("target", target)?;
    let expected = row_costs.len();
    expect_layers("column_costs", expected, column_costs.len())?;
    expect_layers("alive_rows", expected, alive_rows.len())?;
    expect_layers("alive_columns", expected, alive_columns.len())?;
    let row_costs = vectors::<f64>("row_costs", "float64", row_costs)?;
    let column_costs = vectors::<f64>("column_costs", "float64", column_costs)?;
    let alive_rows = masks("alive_rows", alive_rows)?;
    let alive_columns = masks("alive_columns", alive_columns)?;
    let costs = row_costs.slices()?.into_iter().zip(column_costs.slices()?);
    let alive = alive_rows.slices()?.into_iter().zip(alive_columns.slices()?);
    let layers: Vec<cross::CrossLayer<'_>> = costs
        .zip(alive)
        .map(|((row_costs, column_costs), (alive_rows, alive_columns))| cross::CrossLayer {
            row_costs,
            column_costs,
            alive_rows,
            alive_columns,
        })
        .collect();
    let kinds = cross::Kinds { rows, columns };
    let selection = py.detach(|| cross::select_rows_columns(&layers, kinds, target))?;
    Ok(CrossSelection {
        keep_rows: mask_list(py, selection.keep_rows)?,
        keep_columns: mask_list(py, selection.keep_columns)?,
        removed: selection.removed,
        total: selection.total,
        threshold: selection.threshold,
        units_removed: selection.units_removed,
    })
}

/// Independent units that stay and go.
#[pyclass(frozen, module = "surgeon._core")]
pub(super) struct UnitSelection {
    #[pyo3(get)]
    keep: Py<PyList>,
    #[pyo3(get)]
    removed: u64,
    #[pyo3(get)]
    threshold: f64,
    #[pyo3(get)]
    units_removed: u64,
}

#[pymethods]
impl UnitSelection {
    fn __repr__(&self) -> String {
        let Self { removed, threshold, units_removed, .. } = self;
        format!(
            "UnitSelection(removed={removed}, threshold={threshold:?}, units_removed={units_removed})"
        )
    }
}

/// Removes the cheapest units of all layers until `target` parameters are gone.
#[pyfunction]
#[pyo3(signature = (costs, sizes, alive, target, *, per_parameter=false, bonus=None))]
pub(super) fn select_units<'py>(
    py: Python<'py>,
    costs: Vec<Bound<'py, PyAny>>,
    sizes: Vec<Bound<'py, PyAny>>,
    alive: Vec<Bound<'py, PyAny>>,
    target: &Bound<'py, PyAny>,
    per_parameter: bool,
    bonus: Option<Vec<Bound<'py, PyAny>>>,
) -> PyResult<UnitSelection> {
    let target = count("target", target)?;
    expect_layers("sizes", costs.len(), sizes.len())?;
    expect_layers("alive", costs.len(), alive.len())?;
    let bonus = match bonus {
        None => vec![0; costs.len()],
        Some(bonus) => {
            expect_layers("bonus", costs.len(), bonus.len())?;
            bonus.iter().map(|bonus| count("bonus", bonus)).collect::<PyResult<_>>()?
        }
    };
    let costs = vectors::<f64>("costs", "float64", costs)?;
    let sizes = vectors::<u64>("sizes", "uint64", sizes)?;
    let alive = masks("alive", alive)?;
    let layers: Vec<independent::UnitLayer<'_>> = costs
        .slices()?
        .into_iter()
        .zip(sizes.slices()?)
        .zip(alive.slices()?)
        .zip(bonus)
        .map(|(((costs, sizes), alive), bonus)| independent::UnitLayer {
            costs,
            sizes,
            alive,
            bonus,
        })
        .collect();
    let rank =
        if per_parameter { independent::Rank::CostPerParameter } else { independent::Rank::Cost };
    let selection = py.detach(|| independent::select_units(&layers, rank, target))?;
    Ok(UnitSelection {
        keep: mask_list(py, selection.keep)?,
        removed: selection.removed,
        threshold: selection.threshold,
        units_removed: selection.units_removed,
    })
}

/// Parameters that must go so that at least the fraction `sparsity` of `total` is gone.
#[pyfunction]
pub(super) fn removal_target(total: &Bound<'_, PyAny>, sparsity: f64) -> PyResult<u64> {
    Ok(crate::schedule::removal_target(count("total", total)?, sparsity)?)
}

/// Parameters removed in total after each of `shots` equal steps towards `target`.
#[pyfunction]
pub(super) fn linear_schedule(
    total: &Bound<'_, PyAny>,
    target: &Bound<'_, PyAny>,
    shots: &Bound<'_, PyAny>,
) -> PyResult<Vec<u64>> {
    let (total, target) = (count("total", total)?, count("target", target)?);
    Ok(crate::schedule::linear_schedule(total, target, count("shots", shots)?)?)
}
