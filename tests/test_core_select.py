"""Selection of rows and columns and of independent units against the slow truths."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from surgeon import _core
from surgeon.errors import NonFiniteCostError, SelectionError, TargetError
from tests.oracles import selection as oracle

# Many ties, both zeros, rounding noise below zero.
COST = st.one_of(st.integers(0, 5).map(float), st.sampled_from([-0.0, -1e-12, 5e-324, 1e300]), st.floats(0, 1))


@st.composite
def sides(draw: st.DrawFn, longest: int = 7) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    entries = draw(st.lists(st.tuples(COST, st.sampled_from([True, True, True, False])), max_size=longest))
    costs = np.array([cost for cost, _ in entries], np.float64)
    alive = np.array([alive for _, alive in entries], np.bool_)
    # What is dead may hold anything.
    costs[~alive] = draw(st.sampled_from([0.0, np.nan, -np.inf]))
    return costs, alive


@given(
    st.lists(st.tuples(sides(), sides()), max_size=4),
    st.integers(0, 110),
    st.booleans(),
    st.booleans(),
)
def test_rows_and_columns_equal_one_removal_after_the_other(
    layers: list[Any], percent: int, rows: bool, columns: bool
) -> None:
    (row_costs, alive_rows), (column_costs, alive_columns) = (
        ([layer[side][0] for layer in layers], [layer[side][1] for layer in layers]) for side in (0, 1)
    )
    total = sum(len(r) * len(c) for r, c in zip(row_costs, column_costs, strict=True))
    arguments = (row_costs, column_costs, alive_rows, alive_columns, total * percent // 100)
    expected = oracle.attempt(oracle.rows_columns, *arguments, rows=rows, columns=columns)
    found = oracle.attempt(_core.select_rows_columns, *arguments, rows=rows, columns=columns)
    if isinstance(found, oracle.Refused):
        assert found == expected
        return
    for mask, truth in zip(found.keep_rows + found.keep_columns, expected[0] + expected[1], strict=True):
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, truth)
    assert (found.removed, found.threshold, found.units_removed) == expected[2:]
    assert found.total == total


@st.composite
def unit_layers(draw: st.DrawFn) -> list[Any]:
    layers = []
    for costs, alive in draw(st.lists(sides(), max_size=4)):
        sizes = draw(st.lists(st.integers(1, 9), min_size=len(costs), max_size=len(costs)))
        layers.append((costs, np.array(sizes, np.uint64), alive))
    return layers


@given(unit_layers(), st.data(), st.integers(0, 110), st.booleans())
def test_units_equal_one_removal_after_the_other(
    layers: list[Any], data: st.DataObject, percent: int, per_parameter: bool
) -> None:
    costs, sizes, alive = ([layer[part] for layer in layers] for part in range(3))
    one_each = st.lists(st.just(0) | st.integers(1, 40), min_size=len(layers), max_size=len(layers))
    bonus = data.draw(st.none() | one_each)
    target = (sum(int(size.sum()) for size in sizes) + sum(bonus or [])) * percent // 100
    arguments = (costs, sizes, alive, target)
    expected = oracle.attempt(oracle.units, *arguments, per_parameter=per_parameter, bonus=bonus)
    found = oracle.attempt(_core.select_units, *arguments, per_parameter=per_parameter, bonus=bonus)
    if isinstance(found, oracle.Refused):
        assert found == expected
        return
    for mask, truth in zip(found.keep, expected[0], strict=True):
        np.testing.assert_array_equal(mask, truth)
    assert (found.removed, found.threshold, found.units_removed) == expected[1:]


def layer(rows: int = 3, columns: int = 4) -> list[NDArray[Any]]:
    return [np.arange(rows, dtype=float), np.arange(columns, dtype=float), np.ones(rows, bool), np.ones(columns, bool)]


def select(*layers: list[NDArray[Any]], target: Any = 1, **kinds: bool) -> _core.CrossSelection:
    row_costs, column_costs, alive_rows, alive_columns = ([one[part] for one in layers] for part in range(4))
    return _core.select_rows_columns(row_costs, column_costs, alive_rows, alive_columns, target, **kinds)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("side", "kind", "index"), [(0, "row", 2), (1, "column", 3)])
def test_a_cost_that_is_not_finite_is_named(value: float, side: int, kind: str, index: int) -> None:
    bad = layer()
    bad[side][index] = value
    with pytest.raises(NonFiniteCostError) as caught:
        select(layer(), bad, target=0)
    error = caught.value
    assert (error.layer, error.kind, error.index) == (1, kind, index)
    np.testing.assert_equal(error.value, value)
    # Not a candidate, not looked at.
    assert select(layer(), bad, rows=side == 1, columns=side == 0).removed >= 1
    bad[side + 2][index] = False
    assert select(layer(), bad).removed >= 1


def test_a_unit_whose_cost_is_not_finite_is_named() -> None:
    costs = [np.zeros(2), np.array([0.0, np.inf])]
    sizes, alive = [np.ones(2, np.uint64)] * 2, [np.ones(2, bool)] * 2
    with pytest.raises(NonFiniteCostError) as caught:
        _core.select_units(costs, sizes, alive, 1)
    assert (caught.value.layer, caught.value.kind, caught.value.index) == (1, "unit", 1)


def test_units_that_free_nothing_have_no_cost_per_parameter() -> None:
    costs, sizes, alive = [np.ones(2)], [np.array([1, 0], np.uint64)], [np.ones(2, bool)]
    assert _core.select_units(costs, sizes, alive, 1).removed == 1
    with pytest.raises(SelectionError, match="unit 1 of layer 0 frees no parameter"):
        _core.select_units(costs, sizes, alive, 1, per_parameter=True)
    sizes = [np.array([2**63, 2**63], np.uint64)]
    with pytest.raises(SelectionError, match="64 bits"):
        _core.select_units(costs, sizes, alive, 1)


def test_a_key_value_head_goes_with_the_last_of_its_query_heads() -> None:
    # Layers are groups of two query heads; the third group is gone from the start.
    costs = [np.array([1.0, 4.0]), np.array([2.0, 3.0]), np.zeros(2), np.zeros(0)]
    sizes = [np.full(2, 10, np.uint64)] * 3 + [np.zeros(0, np.uint64)]
    alive = [np.ones(2, bool), np.ones(2, bool), np.zeros(2, bool), np.zeros(0, bool)]

    def heads(target: int, bonus: Any = (5, 5, 5, 7)) -> tuple[int, int]:
        found = _core.select_units(costs, sizes, alive, target, bonus=bonus)
        return found.removed, found.units_removed

    assert heads(0) == heads(32) == (32, 0)
    assert heads(33) == (42, 1)
    assert heads(43) == (52, 2)
    assert heads(53) == heads(67) == (67, 3)
    assert heads(68) == heads(82, np.array([5, 5, 5, 7], np.uint64)) == (82, 4)
    with pytest.raises(TargetError) as caught:
        heads(83)
    assert (caught.value.requested, caught.value.available) == (83, 82)
    assert heads(20, None) == (20, 0)


def test_bonuses_that_make_no_sense_are_refused() -> None:
    costs, sizes, alive = [np.ones(2)], [np.array([1, 0], np.uint64)], [np.ones(2, bool)]
    assert _core.select_units(costs, sizes, alive, 1, bonus=[0]).removed == 1
    with pytest.raises(SelectionError, match="unit 1 of layer 0 frees no parameter, so the layer can have no bonus"):
        _core.select_units(costs, sizes, alive, 1, bonus=[1])
    with pytest.raises(SelectionError, match="bonus has 2 layers, expected 1"):
        _core.select_units(costs, sizes, alive, 1, bonus=[0, 0])
    for bonus in (-1, 2**64):
        with pytest.raises(SelectionError, match="bonus must be a whole number"):
            _core.select_units(costs, sizes, alive, 1, bonus=[bonus])
    with pytest.raises(SelectionError, match="64 bits"):
        _core.select_units(costs, [np.ones(2, np.uint64)], alive, 1, bonus=[2**64 - 1])


def test_strides_do_not_matter() -> None:
    rng = np.random.default_rng(0)
    plain = [rng.random(20), rng.random(30), rng.random(20) < 0.9, rng.random(30) < 0.9]
    strided = [np.repeat(part, 3)[::3] for part in plain]
    backward = [part[::-1].copy()[::-1] for part in plain]
    expected = select(plain, target=200)
    for other in (strided, backward):
        found = select(other, target=200)
        np.testing.assert_array_equal(found.keep_rows[0], expected.keep_rows[0])
        np.testing.assert_array_equal(found.keep_columns[0], expected.keep_columns[0])


def test_masks_made_of_other_bytes_are_read_as_masks() -> None:
    odd = layer()
    odd[2] = np.array([0, 2, 255], np.uint8).view(bool)
    found = select(odd, target=4)
    np.testing.assert_array_equal(found.keep_rows[0], [False, True, True])
    assert found.removed == 4


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (0, np.zeros(3, np.float32), r"layer 1: row_costs must be a 1-D float64 array, not a 1-D float32"),
        (1, np.zeros((2, 2)), r"layer 1: column_costs must be a 1-D float64 array, not a 2-D float64"),
        (1, [1.0, 2.0], r"column_costs must be a 1-D float64 array, not <class 'list'>"),
        (2, np.ones(3, np.uint8), r"layer 1: alive_rows must be a 1-D bool array"),
        (3, np.ones(9, bool), r"layer 1: alive_columns has length 9, expected 4"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(part: int, value: Any, message: str) -> None:
    bad = layer()
    bad[part] = value
    with pytest.raises(SelectionError, match=message):
        select(layer(), bad)


def test_lists_and_targets_that_do_not_fit_are_refused() -> None:
    rows, columns, alive_rows, alive_columns = layer()
    with pytest.raises(SelectionError, match="column_costs has 2 layers, expected 1"):
        _core.select_rows_columns([rows], [columns] * 2, [alive_rows], [alive_columns], 1)
    with pytest.raises(SelectionError, match="sizes has 0 layers, expected 1"):
        _core.select_units([rows], [], [alive_rows], 1)
    for target in (-1, 2**64):
        with pytest.raises(SelectionError, match="target must be a whole number"):
            select(layer(), target=target)
    with pytest.raises(TypeError):
        select(layer(), target=1.5)
    assert select(layer(), target=np.int64(3)).removed == 4


def test_results_are_read_only() -> None:
    found = select(layer(), target=4)
    with pytest.raises(AttributeError):
        found.removed = 0  # type: ignore[misc]
    assert repr(found) == "CrossSelection(removed=4, total=12, threshold=0.0, units_removed=1)"


def test_no_layers_at_all() -> None:
    found = select(target=0)
    assert (found.removed, found.total, found.keep_rows, found.threshold) == (0, 0, [], -np.inf)
    with pytest.raises(TargetError):
        select(target=1)


def test_without_the_package_errors_are_plain_value_errors() -> None:
    code = (
        "import sys; from surgeon import _core; sys.modules['surgeon.errors'] = None\n"
        "try: _core.removal_target(1, 2.0)\n"
        "except ValueError as error: assert type(error) is ValueError and 'sparsity' in str(error)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
