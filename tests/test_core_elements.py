"""Thresholds and masks over single elements, and N:M, against the slow truths."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from surgeon import _core
from surgeon.errors import NonFiniteCostError, SelectionError
from tests.oracles import selection as oracle

Arrays = Sequence[NDArray[Any]]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[NDArray[Any]], list[NDArray[np.bool_]]]:
    short = draw(st.booleans())
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32 if short else 64)
    few = st.sampled_from([0.0, -0.0, 1.0, 2.0, 1.5])
    shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), max_size=4)
    costs = [draw(hnp.arrays("f4" if short else "f8", shape, elements=few | finite)) for shape in draw(shapes)]
    alive = [draw(hnp.arrays(np.bool_, layer.shape)) for layer in costs]
    return costs, alive


def stream(costs: Arrays, rank: int, alive: Arrays | None = None) -> _core.Threshold:
    quantile = _core.CostQuantile(rank)
    done = False
    while not done:
        for layer, layer_costs in enumerate(costs):
            quantile.update(layer, layer_costs, None if alive is None else alive[layer])
        done = quantile.finish_pass()
    assert quantile.passes <= (4 if costs and costs[0].dtype == np.float64 else 2)
    return quantile.result


def masks(costs: Arrays, threshold: _core.Threshold, alive: Arrays | None = None) -> list[NDArray[np.bool_]]:
    ties_left, result = threshold.ties, []
    for layer, layer_costs in enumerate(costs):
        mask, ties_left = _core.element_mask(
            layer, layer_costs, threshold, ties_left, None if alive is None else alive[layer]
        )
        result.append(mask)
    assert ties_left == 0
    return result


@given(layers(), st.integers(0, 103), st.booleans())
def test_threshold_and_masks_equal_a_full_sort(drawn: Any, percent: int, masked: bool) -> None:
    costs, alive = drawn
    everything = [np.ones(layer.shape, bool) for layer in costs]
    seen = alive if masked else everything
    rank = -(-sum(int(mask.sum()) for mask in seen) * percent // 100)
    truth = oracle.attempt(oracle.elements, costs, rank, seen)
    found = oracle.attempt(_core.element_threshold, costs, rank, seen if masked else None)
    if isinstance(found, oracle.Refused):
        assert found == truth
        return
    *expected, keep = truth
    assert found == stream(costs, rank, seen if masked else None)
    assert [found.cost, found.below, found.ties, found.count] == expected
    for mask, kept in zip(masks(costs, found, seen if masked else None), keep, strict=True):
        assert mask.shape == kept.shape
        np.testing.assert_array_equal(mask, kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["spread", "narrow", "ties", "half zero"])
def test_streams_longer_than_a_chunk(dtype: type[np.floating[Any]], kind: str) -> None:
    rng = np.random.default_rng(1)
    makers: dict[str, Callable[[int], NDArray[Any]]] = {
        "spread": lambda n: np.exp(4 * rng.standard_normal(n)),
        "narrow": lambda n: 1 + 1e-3 * rng.random(n),
        "ties": lambda n: rng.integers(0, 3, n).astype(float),
        "half zero": lambda n: np.maximum(rng.standard_normal(n), 0),
    }
    costs = [makers[kind](n).astype(dtype) for n in (700_001, 3, 400_000, 0)]
    alive = [rng.random(layer.size) < 0.9 for layer in costs]
    for seen in (None, alive):
        truth = [np.ones(layer.shape, bool) for layer in costs] if seen is None else seen
        rank = sum(int(mask.sum()) for mask in truth) * 2 // 5
        *expected, keep = oracle.elements(costs, rank, truth)
        found = _core.element_threshold(costs, rank, seen)
        assert [found.cost, found.below, found.ties, found.count] == expected
        for mask, kept in zip(masks(costs, found, seen), keep, strict=True):
            np.testing.assert_array_equal(mask, kept)


def test_strides_and_order_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    plain = rng.integers(0, 9, (40, 30)).astype(np.float32)
    alive = rng.random((40, 30)) < 0.8
    expected = _core.element_threshold([plain], 300, [alive])
    keep = masks([plain], expected, [alive])[0]
    columns = np.zeros((40, 60), np.float32)
    columns[:, ::2] = plain
    unaligned = np.frombuffer(b"\0" + plain.tobytes(), np.uint8)[1:].view(np.float32).reshape(40, 30)
    for other in (np.asfortranarray(plain), columns[:, ::2], plain[::-1].copy()[::-1], unaligned):
        assert _core.element_threshold([other], 300, [np.asfortranarray(alive)]) == expected
        np.testing.assert_array_equal(masks([other], expected, [np.asfortranarray(alive)])[0], keep)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fortran", [False, True])
def test_a_cost_that_is_not_finite_is_named(dtype: Any, value: float, fortran: bool) -> None:
    good = np.arange(12, dtype=dtype).reshape(3, 4)
    bad = np.array(good, order="F" if fortran else "C")
    bad[1, 2] = value
    alive = np.ones((3, 4), bool)
    alive[1, 2] = False

    quantile = _core.CostQuantile(3)
    for done in (False, True):
        quantile.update(0, good)
        with pytest.raises(NonFiniteCostError) as caught:
            quantile.update(1, bad)
        assert (caught.value.layer, caught.value.kind, caught.value.index) == (1, "element", 6)
        np.testing.assert_equal(caught.value.value, value)
        # The pass starts over; what is dead is not looked at.
        quantile.update(0, good)
        quantile.update(1, bad, alive)
        assert quantile.finish_pass() is done
    threshold = quantile.result
    assert (threshold.cost, threshold.count) == (1.0, 23)

    assert not _core.element_mask(1, bad, threshold, 9, alive)[0][1, 2]
    with pytest.raises(NonFiniteCostError) as caught:
        _core.element_mask(7, bad, threshold, 9)
    assert (caught.value.layer, caught.value.index) == (7, 6)
    with pytest.raises(NonFiniteCostError) as caught:
        _core.nm_mask(bad, 2, 4)
    assert (caught.value.kind, caught.value.index) == ("element", 6)
    assert _core.nm_mask(bad, 1, 2, columns=2).all(axis=0).tolist() == [False, True, True, True]


def test_passes_must_agree() -> None:
    costs = np.linspace(0, 1, 1000)
    quantile = _core.CostQuantile(500)
    with pytest.raises(SelectionError, match="not known yet"):
        _ = quantile.result
    quantile.update(0, costs)
    assert not quantile.finish_pass()
    quantile.update(0, costs[:-1])
    with pytest.raises(SelectionError, match="streamed 999 elements, the first one 1000"):
        quantile.finish_pass()
    quantile.update(0, costs + 5)
    with pytest.raises(SelectionError, match="changed between two passes"):
        quantile.finish_pass()
    assert quantile.passes == 1
    with pytest.raises(SelectionError, match="layer 3: costs are float32, those before were float64"):
        quantile.update(3, costs.astype(np.float32))
    done = False
    while not done:
        quantile.update(0, costs)
        done = quantile.finish_pass()
    assert quantile.result.cost == costs[499]
    with pytest.raises(SelectionError, match="threshold is known"):
        quantile.update(0, costs)


def test_arguments_that_do_not_fit_are_refused() -> None:
    costs = np.ones((2, 3), np.float32)
    threshold = _core.Threshold(1.0, 0, 2, 6)
    calls: list[Callable[[Any, Any], object]] = [
        lambda c, a: _core.CostQuantile(1).update(5, c, a),
        lambda c, a: _core.element_mask(5, c, threshold, 2, a),
    ]
    for call in calls:
        with pytest.raises(SelectionError, match="layer 5: costs must be a float32 or float64 array, not"):
            call(costs.astype(np.float16), None)
        with pytest.raises(SelectionError, match="<class 'list'>"):
            call([1.0], None)
        with pytest.raises(SelectionError, match="layer 5: alive must be a bool array"):
            call(costs, np.ones((2, 3)))
        with pytest.raises(SelectionError, match=r"layer 5: alive has shape \[3, 2\], the costs \[2, 3\]"):
            call(costs, np.ones((3, 2), bool))
    with pytest.raises(SelectionError, match="alive has 0 layers, expected 1"):
        _core.element_threshold([costs], 1, [])
    with pytest.raises(SelectionError, match="rank must be a whole number"):
        _core.CostQuantile(-1)
    with pytest.raises(SelectionError, match="NaN"):
        _core.Threshold(float("nan"), 0, 0, 0)


def test_thresholds_are_values() -> None:
    threshold = _core.Threshold(1.5, 3, 2, 9)
    assert threshold == _core.Threshold(1.5, 3, 2, 9)
    assert threshold != _core.Threshold(1.5, 3, 1, 9)
    assert len({threshold, _core.Threshold(1.5, 3, 2, 9)}) == 1
    assert repr(threshold) == "Threshold(cost=1.5, below=3, ties=2, count=9)"


def test_other_threads_run_meanwhile() -> None:
    costs = [np.random.default_rng(0).random(1_000_000)] * 20
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1
            stop.wait(1e-4)

    thread = threading.Thread(target=count)
    thread.start()
    before = turns[0]
    _core.element_threshold(costs, 10**7)
    during = turns[0] - before
    stop.set()
    thread.join()
    assert during > 5


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40),
        elements=st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, -1.0]) | st.floats(-9, 9, width=32),
    ),
    st.sampled_from([2, 4, 8, 16, 3, 5, 33]),
    st.data(),
)
def test_nm_equals_a_sort_of_each_group(costs: NDArray[Any], group: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, group - 1))
    columns = data.draw(st.none() | st.integers(0, costs.shape[1]))
    expected = oracle.nm(costs, keep, group, columns)
    np.testing.assert_array_equal(_core.nm_mask(costs, keep, group, columns=columns), expected)
    turned = np.asfortranarray(costs)
    np.testing.assert_array_equal(_core.nm_mask(turned, keep, group, columns=columns), expected)


def test_nm_patterns_that_make_no_sense_are_refused() -> None:
    costs = np.ones((2, 8), np.float32)
    for keep, group in [(0, 4), (4, 4), (5, 4), (1, 1), (0, 0)]:
        with pytest.raises(SelectionError, match="cannot be kept"):
            _core.nm_mask(costs, keep, group)
    with pytest.raises(SelectionError, match="9 columns cannot be pruned"):
        _core.nm_mask(costs, 2, 4, columns=9)
    with pytest.raises(SelectionError, match="must be 2-D, not 1-D"):
        _core.nm_mask(costs[0], 2, 4)
    with pytest.raises(SelectionError, match="keep must be a whole number"):
        _core.nm_mask(costs, -2, 4)
    with pytest.raises(SelectionError, match="float32 or float64"):
        _core.nm_mask(np.ones((2, 8), np.int32), 2, 4)
