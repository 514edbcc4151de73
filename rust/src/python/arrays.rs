//! `NumPy` arrays in and out.

// A bool array made by a view of other memory may hold bytes that Rust's `bool` must not hold, so
// masks are read as bytes once before they are trusted.
#![allow(unsafe_code)]

use numpy::ndarray::Dimension;
use numpy::{
    Element, PyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArray, PyReadonlyArray1,
    PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;
use pyo3::types::PyList;

use super::refuse;

/// A list of 1-D arrays from Python, one a layer.
pub(super) struct Vectors<'py, T: Element>(Vec<PyReadonlyArray1<'py, T>>);

impl<T: Element> Vectors<'_, T> {
    pub(super) fn slices(&self) -> PyResult<Vec<&[T]>> {
        self.0.iter().map(slice).collect()
    }
}

/// Reads a list of 1-D arrays of one dtype.
pub(super) fn vectors<'py, T: Element>(
    what: &str,
    dtype: &str,
    layers: Vec<Bound<'py, PyAny>>,
) -> PyResult<Vectors<'py, T>> {
    let read = |(layer, array): (usize, Bound<'py, PyAny>)| {
        let array = array.cast_into::<PyArray1<T>>().map_err(|error| {
            let found = describe(&error.into_inner());
            refuse(format!("layer {layer}: {what} must be a 1-D {dtype} array, not {found}"))
        })?;
        contiguous(array)
    };
    Ok(Vectors(layers.into_iter().enumerate().map(read).collect::<PyResult<_>>()?))
}

/// Reads a list of 1-D masks.
pub(super) fn masks<'py>(
    what: &str,
    layers: Vec<Bound<'py, PyAny>>,
) -> PyResult<Vectors<'py, bool>> {
    let Vectors(masks) = vectors::<bool>(what, "bool", layers)?;
    Ok(Vectors(masks.into_iter().map(sound).collect::<PyResult<_>>()?))
}

/// An array's elements in row-major order.
pub(super) fn slice<'a, T: Element, D: Dimension>(
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|error| refuse(format!("an array cannot be read: {error}")))
}

/// The array itself if it is aligned and C-contiguous, or such a copy of it.
pub(super) fn contiguous<T: Element, D: Dimension>(
    array: Bound<'_, PyArray<T, D>>,
) -> PyResult<PyReadonlyArray<'_, T, D>> {
    let aligned = array.data().addr().is_multiple_of(align_of::<T>());
    let array = if array.is_c_contiguous() && aligned {
        array
    } else {
        array.call_method1("copy", ("C",))?.cast_into::<PyArray<T, D>>()?
    };
    array.try_readonly().map_err(|error| refuse(format!("an array cannot be read: {error}")))
}

/// The mask itself, or a copy in which every byte is 0 or 1.
pub(super) fn sound<D: Dimension>(
    mask: PyReadonlyArray<'_, bool, D>,
) -> PyResult<PyReadonlyArray<'_, bool, D>> {
    let length = if mask.is_c_contiguous() { mask.len() } else { 0 };
    // SAFETY: a C-contiguous array owns `len` readable bytes from `data` on, the borrow `mask`
    // keeps them alive, and any byte is a valid u8.
    let bytes = unsafe { std::slice::from_raw_parts(mask.data().cast::<u8>(), length) };
    if bytes.iter().fold(0, |all, &byte| all | byte) <= 1 {
        return Ok(mask);
    }
    let bytes = mask.call_method1("view", ("uint8",))?;
    contiguous(bytes.call_method1("astype", ("bool",))?.cast_into()?)
}

/// The bytes of a mask of any shape: 0 where it is false, something else where it is true.
pub(super) fn mask_bytes<'py>(
    layer: usize,
    what: &str,
    mask: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArrayDyn<'py, u8>> {
    if mask.cast::<PyArrayDyn<bool>>().is_err() {
        let found = describe(mask);
        return Err(refuse(format!("layer {layer}: {what} must be a bool array, not {found}")));
    }
    contiguous(mask.call_method1("view", ("uint8",))?.cast_into()?)
}

/// Moves masks out as a list of arrays.
pub(super) fn mask_list(py: Python<'_>, masks: Vec<Vec<bool>>) -> PyResult<Py<PyList>> {
    let arrays = masks.into_iter().map(|mask| PyArray1::from_vec(py, mask));
    Ok(PyList::new(py, arrays.collect::<Vec<_>>())?.unbind())
}

/// What an argument is, for a message.
pub(super) fn describe(value: &Bound<'_, PyAny>) -> String {
    match value.cast::<PyUntypedArray>() {
        Ok(array) => format!("a {}-D {} array", array.ndim(), array.dtype()),
        Err(_) => value.get_type().to_string(),
    }
}
