//! Selection over single elements: thresholds, their masks, N:M.

use numpy::ndarray::{ArrayD, IxDyn};
use numpy::{PyArray, PyArrayDyn, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::arrays::{contiguous, describe, slice, sound};
use super::{count, index, refuse};
use crate::nm;
use crate::select::streaming;
use crate::units::expect_layers;

type Mask<'py> = Bound<'py, PyArrayDyn<bool>>;

/// An array of costs of either type.
enum Costs<'py> {
    Short(PyReadonlyArrayDyn<'py, f32>),
    Long(PyReadonlyArrayDyn<'py, f64>),
}

/// Evaluates `$body` with `$slice` bound to the elements of `$costs`, whichever their type.
macro_rules! with_slice {
    ($costs:expr, $slice:ident => $body:expr) => {
        match $costs {
            Costs::Short(array) => {
                let $slice = slice(array)?;
                $body
            }
            Costs::Long(array) => {
                let $slice = slice(array)?;
                $body
            }
        }
    };
}

impl<'py> Costs<'py> {
    fn read(layer: usize, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = array.cast::<PyArrayDyn<f32>>() {
            return Ok(Self::Short(contiguous(array.clone())?));
        }
        match array.cast::<PyArrayDyn<f64>>() {
            Ok(array) => Ok(Self::Long(contiguous(array.clone())?)),
            Err(_) => Err(refuse(format!(
                "layer {layer}: costs must be a float32 or float64 array, not {}",
                describe(array)
            ))),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Short(array) => array.shape(),
            Self::Long(array) => array.shape(),
        }
    }

    /// The mask that says which of these costs are alive.
    fn alive(
        &self,
        layer: usize,
        mask: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<PyReadonlyArrayDyn<'py, bool>>> {
        let Some(mask) = mask else { return Ok(None) };
        let Ok(array) = mask.cast::<PyArrayDyn<bool>>() else {
            let found = describe(mask);
            return Err(refuse(format!("layer {layer}: alive must be a bool array, not {found}")));
        };
        if array.shape() != self.shape() {
            return Err(refuse(format!(
                "layer {layer}: alive has shape {:?}, the costs {:?}",
                array.shape(),
                self.shape()
            )));
        }
        Ok(Some(sound(contiguous(array.clone())?)?))
    }
}

fn alive_slice<'a>(
    alive: Option<&'a PyReadonlyArrayDyn<'_, bool>>,
) -> PyResult<Option<&'a [bool]>> {
    alive.map(slice).transpose()
}

/// A mask moved out as an array of this shape.
fn array_of<'py>(py: Python<'py>, shape: &[usize], mask: Vec<bool>) -> PyResult<Mask<'py>> {
    let array = ArrayD::from_shape_vec(IxDyn(shape), mask);
    let array = array.map_err(|error| refuse(format!("the mask has no such shape: {error}")))?;
    Ok(PyArray::from_owned_array(py, array))
}

/// Where a stream of costs is cut so that exactly so many of them go.
#[pyclass(frozen, eq, module = "surgeon._core")]
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Threshold(streaming::Threshold);

#[pymethods]
impl Threshold {
    #[new]
    fn new(
        cost: f64,
        below: &Bound<'_, PyAny>,
        ties: &Bound<'_, PyAny>,
        count: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let read = super::count;
        let (below, ties, count) =
            (read("below", below)?, read("ties", ties)?, read("count", count)?);
        if cost.is_nan() {
            return Err(refuse("a threshold cannot be NaN".into()));
        }
        Ok(Self(streaming::Threshold { cost, below, ties, count }))
    }

    #[getter]
    fn cost(&self) -> f64 {
        self.0.cost
    }

    #[getter]
    fn below(&self) -> u64 {
        self.0.below
    }

    #[getter]
    fn ties(&self) -> u64 {
        self.0.ties
    }

    #[getter]
    fn count(&self) -> u64 {
        self.0.count
    }

    fn __hash__(&self) -> u64 {
        crate::units::order_key(self.0.cost) ^ self.0.below.rotate_left(16) ^ self.0.ties
    }

    fn __repr__(&self) -> String {
        let streaming::Threshold { cost, below, ties, count } = self.0;
        format!("Threshold(cost={cost:?}, below={below}, ties={ties}, count={count})")
    }
}

/// The exact rank-th smallest cost of a stream that never lies in memory as a whole.
#[pyclass(module = "surgeon._core")]
pub(super) struct CostQuantile(streaming::CostQuantile);

#[pymethods]
impl CostQuantile {
    #[new]
    fn new(rank: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self(streaming::CostQuantile::new(count("rank", rank)?)))
    }

    /// Feeds one layer's costs in the current pass.
    #[pyo3(signature = (layer, costs, alive=None))]
    fn update<'py>(
        &mut self,
        py: Python<'py>,
        layer: &Bound<'py, PyAny>,
        costs: &Bound<'py, PyAny>,
        alive: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        self.feed(py, index(layer)?, costs, alive)
    }

    /// Ends the current pass; true when the threshold is known.
    fn finish_pass(&mut self) -> PyResult<bool> {
        Ok(self.0.finish_pass()?)
    }

    /// Passes done so far.
    #[getter]
    fn passes(&self) -> u64 {
        self.0.passes()
    }

    /// The threshold.
    #[getter]
    fn result(&self) -> PyResult<Threshold> {
        match self.0.result() {
            Some(threshold) => Ok(Threshold(threshold)),
            None => Err(refuse("the threshold is not known yet: another pass is needed".into())),
        }
    }
}

impl CostQuantile {
    fn feed<'py>(
        &mut self,
        py: Python<'py>,
        layer: usize,
        costs: &Bound<'py, PyAny>,
        alive: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<()> {
        let costs = Costs::read(layer, costs)?;
        let alive = costs.alive(layer, alive)?;
        let alive = alive_slice(alive.as_ref())?;
        let quantile = &mut self.0;
        with_slice!(&costs, costs => py.detach(|| quantile.update(layer, costs, alive))?);
        Ok(())
    }
}

/// Cuts the costs of all layers so that exactly `rank` elements go.
#[pyfunction]
#[pyo3(signature = (costs, rank, alive=None))]
#[allow(clippy::needless_pass_by_value)] // lists are extracted, not borrowed
pub(super) fn element_threshold<'py>(
    py: Python<'py>,
    costs: Vec<Bound<'py, PyAny>>,
    rank: &Bound<'py, PyAny>,
    alive: Option<Vec<Bound<'py, PyAny>>>,
) -> PyResult<Threshold> {
    if let Some(alive) = &alive {
        expect_layers("alive", costs.len(), alive.len())?;
    }
    let mut quantile = CostQuantile::new(rank)?;
    loop {
        for (layer, costs) in costs.iter().enumerate() {
            quantile.feed(py, layer, costs, alive.as_ref().map(|alive| &alive[layer]))?;
        }
        if quantile.finish_pass()? {
            return quantile.result();
        }
    }
}

/// Keep mask of one layer under a threshold, and how many ties are left to go.
#[pyfunction]
#[pyo3(signature = (layer, costs, threshold, ties_left, alive=None))]
pub(super) fn element_mask<'py>(
    py: Python<'py>,
    layer: &Bound<'py, PyAny>,
    costs: &Bound<'py, PyAny>,
    threshold: &Bound<'py, Threshold>,
    ties_left: &Bound<'py, PyAny>,
    alive: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Mask<'py>, u64)> {
    let (layer, ties_left) = (index(layer)?, count("ties_left", ties_left)?);
    let costs = Costs::read(layer, costs)?;
    let alive = costs.alive(layer, alive)?;
    let alive = alive_slice(alive.as_ref())?;
    let cut = &threshold.get().0;
    let (mask, left) = with_slice!(&costs, costs => {
        py.detach(|| streaming::element_mask(layer, costs, alive, cut, ties_left))?
    });
    Ok((array_of(py, costs.shape(), mask)?, left))
}

/// Keep mask with exactly `keep` of every `group` consecutive columns.
#[pyfunction]
#[pyo3(signature = (costs, keep, group, *, columns=None))]
pub(super) fn nm_mask<'py>(
    py: Python<'py>,
    costs: &Bound<'py, PyAny>,
    keep: &Bound<'py, PyAny>,
    group: &Bound<'py, PyAny>,
    columns: Option<&Bound<'py, PyAny>>,
) -> PyResult<Mask<'py>> {
    let pattern = nm::Pattern::new(count("keep", keep)?, count("group", group)?)?;
    let costs = Costs::read(0, costs)?;
    let &[_, width] = costs.shape() else {
        return Err(refuse(format!("costs must be 2-D, not {}-D", costs.shape().len())));
    };
    let pruned = match columns {
        None => width,
        Some(columns) => usize::try_from(count("columns", columns)?).unwrap_or(usize::MAX),
    };
    let mask = with_slice!(&costs, costs => {
        py.detach(|| nm::nm_mask(costs, width, pruned, pattern))?
    });
    array_of(py, costs.shape(), mask)
}
