//! The Python module `surgeon._core`: the only place that knows `PyO3` and `NumPy`.
//!
//! Arrays come in without a copy where they are contiguous, masks are moved out, every heavy call
//! runs without the interpreter's lock, and [`raise`] is the one place where errors cross over.

mod arrays;
mod ledger;
mod select;
mod stream;

use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyValueError};
use pyo3::prelude::*;

use crate::error::CoreError;

/// Turns an error into the exception of `surgeon.errors` that stands for it.
///
/// The module is imported when an error is raised, not before, so that the extension loads on
/// its own. Only if that import fails does a plain `ValueError` take its place.
fn raise(py: Python<'_>, error: &CoreError) -> PyErr {
    let exception = || -> PyResult<PyErr> {
        let errors = py.import("surgeon.errors")?;
        let instance = match *error {
            CoreError::NonFinite { layer, kind, index, value } => errors
                .getattr("NonFiniteCostError")?
                .call1((layer, kind.to_string(), index, value))?,
            CoreError::Target { requested, available } => {
                errors.getattr("TargetError")?.call1((requested, available))?
            }
            _ => errors.getattr("SelectionError")?.call1((error.to_string(),))?,
        };
        Ok(PyErr::from_value(instance))
    };
    if let CoreError::Memory(_) = error {
        return PyMemoryError::new_err(error.to_string());
    }
    exception().unwrap_or_else(|_| PyValueError::new_err(error.to_string()))
}

impl From<CoreError> for PyErr {
    fn from(error: CoreError) -> Self {
        Python::attach(|py| raise(py, &error))
    }
}

/// A `SelectionError` with this message.
fn refuse(message: String) -> PyErr {
    CoreError::Argument(message).into()
}

/// A count from Python: negative or larger than 64 bits is a `SelectionError`.
fn count(what: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    value.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(value.py()) {
            refuse(format!("{what} must be a whole number from 0 to 2**64 - 1, not {value}"))
        } else {
            error
        }
    })
}

/// A layer's number from Python.
fn index(layer: &Bound<'_, PyAny>) -> PyResult<usize> {
    Ok(usize::try_from(count("layer", layer)?).unwrap_or(usize::MAX))
}

/// The version of the compiled core.
#[pyfunction]
fn version() -> &'static str {
    crate::VERSION
}

/// Exact, deterministic selection of what a pruned model loses.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::ledger::{ElementLedger, Ledger};
    #[pymodule_export]
    use super::select::{
        CrossSelection, UnitSelection, linear_schedule, removal_target, select_rows_columns,
        select_units,
    };
    #[pymodule_export]
    use super::stream::{CostQuantile, Threshold, element_mask, element_threshold, nm_mask};
    #[pymodule_export]
    use super::version;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = crate::VERSION;
}
