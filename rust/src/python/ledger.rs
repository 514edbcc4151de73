//! The ledgers as Python classes.

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};

use super::arrays::{mask_bytes, masks, slice};
use super::{count, index};
use crate::ledger;
use crate::units::Shape;

/// Books of the rows and columns that are gone, over all shots.
#[pyclass(module = "surgeon._core")]
pub(super) struct Ledger {
    inner: ledger::Ledger,
}

#[pymethods]
impl Ledger {
    #[new]
    fn new(shapes: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>) -> PyResult<Self> {
        let shape = |(rows, columns): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
            Ok(Shape { rows: count("rows", &rows)?, columns: count("columns", &columns)? })
        };
        let shapes = shapes.into_iter().map(shape).collect::<PyResult<_>>()?;
        Ok(Self { inner: ledger::Ledger::new(shapes)? })
    }

    /// Books one shot; returns the parameters it newly removed.
    fn commit<'py>(
        &mut self,
        py: Python<'py>,
        keep_rows: Vec<Bound<'py, PyAny>>,
        keep_columns: Vec<Bound<'py, PyAny>>,
    ) -> PyResult<u64> {
        let rows = masks("keep_rows", keep_rows)?;
        let columns = masks("keep_columns", keep_columns)?;
        let (rows, columns) = (rows.slices()?, columns.slices()?);
        let inner = &mut self.inner;
        Ok(py.detach(|| inner.commit(&rows, &columns))?)
    }

    /// Parameters removed so far.
    #[getter]
    fn removed(&self) -> u64 {
        self.inner.books().removed()
    }

    /// Parameters of all layers.
    #[getter]
    fn total(&self) -> u64 {
        self.inner.books().total()
    }

    /// Removed part of the total.
    #[getter]
    fn sparsity(&self) -> f64 {
        self.inner.books().sparsity()
    }

    /// Number of shots booked.
    #[getter]
    fn shots(&self) -> usize {
        self.inner.books().shots()
    }

    /// Parameters removed in total after each shot.
    #[getter]
    fn history(&self) -> Vec<u64> {
        self.inner.books().history().to_vec()
    }

    /// Parameters removed from one layer.
    fn layer_removed(&self, layer: &Bound<'_, PyAny>) -> PyResult<u64> {
        Ok(self.inner.layer_removed(index(layer)?)?)
    }

    /// A copy of one layer's row mask.
    fn keep_rows<'py>(&self, layer: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<bool>>> {
        Ok(PyArray1::from_slice(layer.py(), self.inner.keep_rows(index(layer)?)?))
    }

    /// A copy of one layer's column mask.
    fn keep_columns<'py>(&self, layer: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<bool>>> {
        Ok(PyArray1::from_slice(layer.py(), self.inner.keep_columns(index(layer)?)?))
    }

    /// The ledger as versioned, checksummed bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_bytes())
    }

    /// Reads what `to_bytes` wrote.
    #[classmethod]
    fn from_bytes(_class: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        Ok(Self { inner: ledger::Ledger::from_bytes(data)? })
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.inner == other.inner
    }

    fn __repr__(&self) -> String {
        repr("Ledger", self.inner.layers(), self.inner.books())
    }
}

/// Books of the single weights that are gone, over all shots.
#[pyclass(module = "surgeon._core")]
pub(super) struct ElementLedger {
    inner: ledger::ElementLedger,
}

#[pymethods]
impl ElementLedger {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // lists are extracted, not borrowed
    fn new(sizes: Vec<Bound<'_, PyAny>>) -> PyResult<Self> {
        let sizes = sizes.iter().map(|size| count("size", size)).collect::<PyResult<_>>()?;
        Ok(Self { inner: ledger::ElementLedger::new(sizes)? })
    }

    /// Stages one layer for the shot in progress.
    fn book<'py>(
        &mut self,
        py: Python<'py>,
        layer: &Bound<'py, PyAny>,
        keep: &Bound<'py, PyAny>,
    ) -> PyResult<()> {
        let layer = index(layer)?;
        let keep = mask_bytes(layer, "keep", keep)?;
        let (inner, keep) = (&mut self.inner, slice(&keep)?);
        Ok(py.detach(|| inner.book(layer, keep))?)
    }

    /// Closes the shot in progress; returns the parameters it newly removed.
    fn commit(&mut self) -> PyResult<u64> {
        Ok(self.inner.commit()?)
    }

    /// Parameters removed so far.
    #[getter]
    fn removed(&self) -> u64 {
        self.inner.books().removed()
    }

    /// Parameters of all layers.
    #[getter]
    fn total(&self) -> u64 {
        self.inner.books().total()
    }

    /// Removed part of the total.
    #[getter]
    fn sparsity(&self) -> f64 {
        self.inner.books().sparsity()
    }

    /// Number of shots booked.
    #[getter]
    fn shots(&self) -> usize {
        self.inner.books().shots()
    }

    /// Parameters removed in total after each shot.
    #[getter]
    fn history(&self) -> Vec<u64> {
        self.inner.books().history().to_vec()
    }

    /// Parameters removed from one layer.
    fn layer_removed(&self, layer: &Bound<'_, PyAny>) -> PyResult<u64> {
        Ok(self.inner.layer_removed(index(layer)?)?)
    }

    /// The closed shots as versioned, checksummed bytes.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.inner.to_bytes())
    }

    /// Reads what `to_bytes` wrote.
    #[classmethod]
    fn from_bytes(_class: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        Ok(Self { inner: ledger::ElementLedger::from_bytes(data)? })
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.inner == other.inner
    }

    fn __repr__(&self) -> String {
        repr("ElementLedger", self.inner.layers(), self.inner.books())
    }
}

fn repr(class: &str, layers: usize, books: &ledger::Books) -> String {
    let (removed, total, shots) = (books.removed(), books.total(), books.shots());
    format!("{class}(layers={layers}, removed={removed}, total={total}, shots={shots})")
}
