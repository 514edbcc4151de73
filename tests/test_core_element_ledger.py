"""The ledger of single elements against counting them one by one."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from surgeon import _core
from surgeon.errors import SelectionError

Masks = list[NDArray[np.bool_]]
History = tuple[list[int], list[Masks]]


@st.composite
def shots(draw: st.DrawFn) -> History:
    """Sizes, and masks of any shape that only ever lose."""
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9), max_size=4))
    keep = [np.ones(shape, bool) for shape in shapes]
    history = []
    for _ in range(draw(st.integers(0, 4))):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        keep = [np.asarray(mask & (rng.random(mask.shape) < 0.8)) for mask in keep]
        history.append(keep)
    return [mask.size for mask in keep], history


def count(masks: Masks) -> int:
    return sum(not stands for mask in masks for stands in mask.flat)


def book(sizes: list[int], history: list[Masks]) -> _core.ElementLedger:
    ledger = _core.ElementLedger(sizes)
    for masks in history:
        for layer, mask in enumerate(masks):
            ledger.book(layer, mask)
        ledger.commit()
    return ledger


@given(shots(), st.randoms(use_true_random=False))
def test_the_ledger_counts_and_comes_back_from_bytes(drawn: History, random: Any) -> None:
    sizes, history = drawn
    ledger = _core.ElementLedger(sizes)
    removed = [count(masks) for masks in history]
    for masks, before, after in zip(history, [0, *removed], removed, strict=False):
        for layer in random.sample(range(len(sizes)), len(sizes)):
            ledger.book(layer, masks[layer])
        assert ledger.removed == before
        assert ledger.commit() == after - before
        assert ledger.removed == after
        for layer, mask in enumerate(masks):
            assert ledger.layer_removed(layer) == count([mask])
    total = sum(sizes)
    assert (ledger.history, ledger.shots, ledger.total) == (removed, len(removed), total)
    assert ledger.sparsity == (ledger.removed / total if total else 0.0)
    again = _core.ElementLedger.from_bytes(ledger.to_bytes())
    assert again == ledger
    assert again.to_bytes() == ledger.to_bytes()


def test_a_shot_books_every_layer_once_or_not_at_all() -> None:
    ledger = book([6, 2], [[np.arange(6).reshape(2, 3) > 2, np.ones(2, bool)]])
    before = ledger.to_bytes()
    assert (ledger.removed, ledger.layer_removed(0)) == (3, 3)

    ledger.book(1, np.zeros(2, bool))
    assert ledger.to_bytes() == before
    assert ledger == _core.ElementLedger.from_bytes(before)
    with pytest.raises(SelectionError, match="layer 1 is booked twice in one shot"):
        ledger.book(1, np.ones(2, bool))
    with pytest.raises(SelectionError, match="layer 0 is not booked in this shot"):
        ledger.commit()

    # The refused shot left nothing behind, so layer 1 is free again.
    ledger.book(1, np.zeros(2, bool))
    ledger.book(0, np.arange(6) > 1)
    with pytest.raises(SelectionError, match="layer 0 has lost 2 elements, but 3 after an earlier shot"):
        ledger.commit()
    assert ledger.to_bytes() == before
    assert ledger.shots == 1

    ledger.book(0, np.arange(6) > 3)
    ledger.book(1, np.array([True, False]))
    assert ledger.commit() == 2
    assert ledger.history == [3, 5]
    assert repr(ledger) == "ElementLedger(layers=2, removed=5, total=8, shots=2)"
    assert ledger != _core.ElementLedger.from_bytes(before)


def test_how_a_mask_lies_in_memory_does_not_matter() -> None:
    plain = np.random.default_rng(0).random((40, 60)) < 0.7
    odd = plain.astype(np.uint8) * np.arange(1, 61, dtype=np.uint8)
    read_only = plain.copy()
    read_only.flags.writeable = False
    for mask in (plain, plain.T, np.asfortranarray(plain), plain[::-1, ::-1], odd.view(bool), read_only, plain.ravel()):
        assert book([2400], [[mask]]).removed == count([plain])
    wide = np.repeat(plain, 2, axis=1)
    assert book([2400], [[wide[:, ::2]]]).removed == count([plain])


def test_long_masks_are_counted_on_all_threads_alike() -> None:
    size = 3_000_001
    mask = np.random.default_rng(1).integers(0, 3, size) > 0
    ledgers = [_core.ElementLedger([size]) for _ in range(4)]
    threads = [threading.Thread(target=ledger.book, args=(0, mask)) for ledger in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ledger.commit() for ledger in ledgers] == [size - int(mask.sum())] * 4


def test_masks_that_do_not_fit_are_refused() -> None:
    ledger = _core.ElementLedger([6, 2])
    with pytest.raises(SelectionError, match="layer 1: keep has length 6, expected 2"):
        ledger.book(1, np.ones((2, 3), bool))
    with pytest.raises(SelectionError, match=r"layer 0: keep must be a bool array, not a 1-D uint8 array"):
        ledger.book(0, np.ones(6, np.uint8))
    with pytest.raises(SelectionError, match=r"layer 0: keep must be a bool array, not <class 'list'>"):
        ledger.book(0, [True] * 6)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="there is no layer 2: the ledger has 2"):
        ledger.book(2, np.ones(6, bool))
    with pytest.raises(SelectionError, match="there is no layer 2"):
        ledger.layer_removed(2)
    for layer in (-1, 2**64):
        with pytest.raises(SelectionError, match="layer must be a whole number"):
            ledger.book(layer, np.ones(6, bool))
    # What was refused is not staged.
    ledger.book(0, np.ones(6, bool))
    ledger.book(1, np.ones(2, bool))
    assert ledger.commit() == 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert _core.ElementLedger([2**64 - 1, 0]).total == 2**64 - 1
    with pytest.raises(SelectionError, match="64 bits"):
        _core.ElementLedger([2**64 - 1, 1])
    with pytest.raises(SelectionError, match="size must be a whole number"):
        _core.ElementLedger([-1])


def test_the_two_kinds_of_ledger_refuse_each_other() -> None:
    elements, matrices = _core.ElementLedger([6]), _core.Ledger([(2, 3)])
    with pytest.raises(SelectionError, match="this is a ledger of rows and columns, not of single elements"):
        _core.ElementLedger.from_bytes(matrices.to_bytes())
    with pytest.raises(SelectionError, match="this is a ledger of single elements, not of rows and columns"):
        _core.Ledger.from_bytes(elements.to_bytes())
    assert elements != matrices


@given(shots(), st.integers(0), st.integers(1, 255), st.booleans())
def test_damaged_bytes_are_refused(drawn: History, place: int, flip: int, cut: bool) -> None:
    data = bytearray(book(*drawn).to_bytes())
    place %= len(data)
    if cut:
        del data[place:]
    else:
        data[place] ^= flip
    with pytest.raises(SelectionError, match="this is no intact ledger"):
        _core.ElementLedger.from_bytes(bytes(data))


@given(st.binary(max_size=99))
def test_any_bytes_are_refused_without_harm(data: bytes) -> None:
    with pytest.raises(SelectionError):
        _core.ElementLedger.from_bytes(data)
