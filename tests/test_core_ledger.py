"""Targets, schedules and the ledger against the slow truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgeon import _core
from surgeon.errors import SelectionError, TargetError
from tests.oracles import selection as oracle

TOTALS = st.integers(0, 2**64 - 1)


@given(TOTALS, st.integers(0, 10**9 - 1))
def test_targets_are_exact_in_decimal(total: int, digits: int) -> None:
    sparsity = f"0.{digits:09}"
    assert _core.removal_target(total, float(sparsity)) == oracle.removal_target(total, sparsity)


def test_targets_that_floats_miss() -> None:
    assert _core.removal_target(10, 0.3) == 3
    assert _core.removal_target(100, 0.07) == 7
    assert _core.removal_target(2**53 + 1, 0.5) == 2**52 + 1
    for sparsity in (-0.1, 1.0, float("nan"), float("inf")):
        with pytest.raises(SelectionError, match="sparsity must lie in"):
            _core.removal_target(10, sparsity)
    with pytest.raises(SelectionError, match="total must be a whole number"):
        _core.removal_target(-1, 0.5)


@given(TOTALS, st.data(), st.integers(1, 60))
def test_schedules_are_exact(total: int, data: st.DataObject, shots: int) -> None:
    target = data.draw(st.integers(0, total))
    schedule = _core.linear_schedule(total, target, shots)
    assert schedule == oracle.linear_schedule(target, shots)
    assert schedule[-1] == target


def test_schedules_that_make_no_sense_are_refused() -> None:
    for shots in (0, 2**40):
        with pytest.raises(SelectionError, match="number of shots"):
            _core.linear_schedule(10, 5, shots)
    with pytest.raises(SelectionError, match="shots must be a whole number"):
        _core.linear_schedule(10, 5, -1)
    with pytest.raises(TargetError):
        _core.linear_schedule(10, 11, 2)


Masks = list[NDArray[np.bool_]]


@st.composite
def shots(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[Masks, Masks]]]:
    shapes = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
    keep: tuple[Masks, Masks] = tuple([np.ones(shape[side], bool) for shape in shapes] for side in (0, 1))  # type: ignore[assignment]
    history = []
    for _ in range(draw(st.integers(0, 4))):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        keep = tuple([mask & (rng.random(mask.size) < 0.8) for mask in side] for side in keep)  # type: ignore[assignment]
        history.append(keep)
    return shapes, history


@given(shots())
def test_the_ledger_counts_and_comes_back_from_bytes(drawn: Any) -> None:
    shapes, history = drawn
    ledger = _core.Ledger(shapes)
    removed = [oracle.count_removed(rows, columns) for rows, columns in history]
    for (rows, columns), before, after in zip(history, [0, *removed], removed, strict=False):
        assert ledger.commit(rows, columns) == after - before
        assert ledger.removed == after
        for layer, (r, c) in enumerate(zip(rows, columns, strict=True)):
            assert ledger.layer_removed(layer) == oracle.count_removed([r], [c])
            np.testing.assert_array_equal(ledger.keep_rows(layer), r)
            np.testing.assert_array_equal(ledger.keep_columns(layer), c)
    total = sum(rows * columns for rows, columns in shapes)
    assert (ledger.history, ledger.shots, ledger.total) == (removed, len(removed), total)
    assert ledger.sparsity == (ledger.removed / total if total else 0.0)
    again = _core.Ledger.from_bytes(ledger.to_bytes())
    assert again == ledger
    assert again.to_bytes() == ledger.to_bytes()


def test_what_went_does_not_come_back() -> None:
    ledger = _core.Ledger([(2, 3), (4, 1)])
    rows = [np.ones(2, bool), np.array([True, True, False, True])]
    columns = [np.array([True, False, True]), np.ones(1, bool)]
    assert ledger.commit(rows, columns) == 3
    before = ledger.to_bytes()
    everything = ([np.ones(2, bool), np.ones(4, bool)], [np.ones(3, bool), np.ones(1, bool)])
    with pytest.raises(SelectionError, match="column 1 of layer 0 was removed in an earlier shot"):
        ledger.commit(*everything)
    everything[1][0][1] = False
    with pytest.raises(SelectionError, match="row 2 of layer 1 was removed in an earlier shot"):
        ledger.commit(*everything)
    with pytest.raises(SelectionError, match="layer 1: keep_rows has length 3, expected 4"):
        ledger.commit([rows[0], rows[1][:3]], columns)
    with pytest.raises(SelectionError, match="keep_columns has 1 layers, expected 2"):
        ledger.commit(rows, columns[:1])
    with pytest.raises(SelectionError, match="layer 0: keep_rows must be a 1-D bool array"):
        ledger.commit([np.ones(2), rows[1]], columns)  # type: ignore[list-item]
    assert ledger.to_bytes() == before
    assert ledger.shots == 1
    assert repr(ledger) == "Ledger(layers=2, removed=3, total=10, shots=1)"


def test_copies_do_not_reach_into_the_ledger() -> None:
    ledger = _core.Ledger([(2, 2)])
    ledger.keep_rows(0)[:] = False
    assert ledger.keep_rows(0).all()
    with pytest.raises(SelectionError, match="there is no layer 1"):
        ledger.keep_rows(1)
    with pytest.raises(SelectionError, match="layer must be a whole number"):
        ledger.layer_removed(-1)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SelectionError, match="64 bits"):
        _core.Ledger([(2**40, 2**40)])
    with pytest.raises(MemoryError):
        _core.Ledger([(2**62, 1)])
    with pytest.raises(SelectionError, match="rows must be a whole number"):
        _core.Ledger([(-1, 1)])


@given(shots(), st.integers(0), st.integers(1, 255), st.booleans())
def test_damaged_bytes_are_refused(drawn: Any, place: int, flip: int, cut: bool) -> None:
    shapes, history = drawn
    ledger = _core.Ledger(shapes)
    for rows, columns in history:
        ledger.commit(rows, columns)
    data = bytearray(ledger.to_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= flip
    with pytest.raises(SelectionError, match="this is no intact ledger"):
        _core.Ledger.from_bytes(bytes(data))


@given(st.binary(max_size=99))
def test_any_bytes_are_refused_without_harm(data: bytes) -> None:
    with pytest.raises(SelectionError):
        _core.Ledger.from_bytes(data)


def test_the_version_is_the_packages() -> None:
    assert _core.version() == _core.__version__
    assert _core.__version__.count(".") == 2
