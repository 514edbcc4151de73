"""Selection: tensors in, tensors out, around the Rust core that sorts, counts and breaks ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from surgeon import _core
from surgeon.errors import NonFiniteCostError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor


@dataclass(frozen=True)
class RowColumnCosts:
    """Costs of one layer's rows and columns, over the full layer.

    Attributes:
        rows: float64 ``[R]``; whatever where dead.
        columns: float64 ``[C]``; whatever where dead.
        alive_rows: bool ``[R]``.
        alive_columns: bool ``[C]``.
    """

    rows: Tensor
    columns: Tensor
    alive_rows: Tensor
    alive_columns: Tensor


@dataclass(frozen=True)
class RowColumnSelection:
    """What goes, over all layers.

    Attributes:
        keep_rows: bool ``[R]`` a layer, False for removed and dead.
        keep_columns: bool ``[C]`` a layer, the same.
        removed: parameters gone, dead units included, overlap counted once.
        threshold: largest cost that went; ``-inf`` if none did.
        units: rows and columns newly removed.
    """

    keep_rows: list[Tensor]
    keep_columns: list[Tensor]
    removed: int
    threshold: float
    units: int


def select_rows_columns(
    costs: Sequence[RowColumnCosts], target: int, names: Sequence[str], *, rows: bool, columns: bool
) -> RowColumnSelection:
    """Remove the cheapest rows and columns of all layers until ``target`` parameters are gone.

    The smallest set that reaches the target, in the order (cost, layer, row before column, index).

    Args:
        costs: one a layer.
        target: parameters gone in total, those of dead units included.
        names: layer names, for messages.
        rows: whether rows may go.
        columns: whether columns may go.

    Raises:
        NonFiniteError: a cost is not finite; names the layer and the index.
        TargetError: more is asked for than can go.
    """
    try:
        found = _core.select_rows_columns(
            [_array(c.rows) for c in costs],
            [_array(c.columns) for c in costs],
            [_flags(c.alive_rows) for c in costs],
            [_flags(c.alive_columns) for c in costs],
            target,
            rows=rows,
            columns=columns,
        )
    except NonFiniteCostError as error:
        raise _named(error, names) from error
    return RowColumnSelection(
        keep_rows=[torch.from_numpy(keep) for keep in found.keep_rows],
        keep_columns=[torch.from_numpy(keep) for keep in found.keep_columns],
        removed=found.removed,
        threshold=found.threshold,
        units=found.units_removed,
    )


@dataclass(frozen=True)
class UnitCosts:
    """Units of one group, all of one size.

    Attributes:
        costs: float64 ``[U]``; whatever where dead.
        alive: bool ``[U]``.
        size: parameters that each unit frees.
        bonus: parameters that the last unit frees besides.
    """

    costs: Tensor
    alive: Tensor
    size: int
    bonus: int = 0


@dataclass(frozen=True)
class ChosenUnits:
    """What goes, over all groups.

    Attributes:
        keep: bool ``[U]`` a group, False for removed and dead.
        removed: parameters gone, dead units included.
        threshold: largest score that went; ``-inf`` if none did.
        units: units newly removed.
    """

    keep: list[Tensor]
    removed: int
    threshold: float
    units: int


def select_units(units: Sequence[UnitCosts], target: int, names: Sequence[str], *, per_parameter: bool) -> ChosenUnits:
    """Remove the cheapest units of all groups until ``target`` parameters are gone.

    The smallest set that reaches the target, in the order (score, group, index).

    Args:
        units: one a group.
        target: parameters gone in total, those of dead units included.
        names: group names, for messages.
        per_parameter: rank by cost per parameter instead of cost.

    Raises:
        NonFiniteError: a cost is not finite; names the group and the index.
        TargetError: more is asked for than can go.
    """
    try:
        found = _core.select_units(
            [_array(u.costs) for u in units],
            [np.full(u.costs.numel(), u.size, dtype=np.uint64) for u in units],
            [_flags(u.alive) for u in units],
            target,
            per_parameter=per_parameter,
            bonus=[u.bonus for u in units],
        )
    except NonFiniteCostError as error:
        raise _named(error, names) from error
    keep = [torch.from_numpy(mask) for mask in found.keep]
    return ChosenUnits(keep, found.removed, found.threshold, found.units_removed)


def _named(error: NonFiniteCostError, names: Sequence[str]) -> NonFiniteError:
    name = names[error.layer]
    what = f"cost of {error.kind} {error.index} of layer {name} is {error.value}"
    return NonFiniteError(what, layer=name, index=error.index)


@dataclass(frozen=True)
class ElementCosts:
    """Costs of one layer's candidates among single weights.

    Attributes:
        layer: layer index.
        costs: float32 or float64 ``[R, C]``; whatever where no candidate.
        candidates: bool ``[R, C]``.
    """

    layer: int
    costs: Tensor
    candidates: Tensor


class ElementSelection:
    """The cheapest ``rank`` candidates of all layers, without holding any layer's costs.

    Args:
        stream: yields every layer's costs, in order and the same each time; it is gone through two
            times for float32, two to four times for float64.
        rank: how many go.
        names: layer names, for messages.

    Raises:
        NonFiniteError: a cost is not finite; names the layer and the index.
        TargetError: there are fewer candidates.
    """

    def __init__(self, stream: Callable[[], Iterable[ElementCosts]], rank: int, names: Sequence[str]) -> None:
        quantile = _core.CostQuantile(rank)
        done = False
        while not done:
            for part in stream():
                try:
                    quantile.update(part.layer, _elements(part.costs), _mask(part.candidates))
                except NonFiniteCostError as error:
                    raise _named(error, names) from error
            done = quantile.finish_pass()
        self._threshold = quantile.result
        self._ties_left = self._threshold.ties
        self._next = 0

    @property
    def threshold(self) -> float:
        """Largest cost that goes; ``-inf`` if none does."""
        return self._threshold.cost

    def gone(self, part: ElementCosts) -> Tensor:
        """Which candidates of a layer go, bool ``[R, C]``; ask for the layers in order, each once."""
        assert part.layer >= self._next, "layers are asked for in order"
        self._next = part.layer + 1
        keep, self._ties_left = _core.element_mask(
            part.layer, _elements(part.costs), self._threshold, self._ties_left, _mask(part.candidates)
        )
        return part.candidates & ~torch.from_numpy(keep).to(part.candidates.device)


def nm_keep(costs_RC: Tensor, keep: int, group: int, *, layer: str | None = None) -> Tensor:
    """Keep mask with exactly ``keep`` of every ``group`` consecutive columns, from column 0 of each row.

    The largest costs stay; among equal ones the lower index goes first. A last group of fewer than
    ``group`` columns keeps at most ``keep``.

    Args:
        costs_RC: float64 is compared as it is, everything else as float32.
        keep: how many of a group stay, ``1 <= keep < group``.
        group: columns of a group.
        layer: layer name, for messages.

    Returns:
        bool ``[R, C]`` on the costs' device.

    Raises:
        NonFiniteError: a cost is not finite; ``index`` is row-major.
        SelectionError: a pattern that makes no sense.
    """
    try:
        mask = _core.nm_mask(_elements(costs_RC), keep, group)
    except NonFiniteCostError as error:
        raise NonFiniteError(
            f"cost of {error.kind} {error.index} of layer {layer} is {error.value}", layer=layer, index=error.index
        ) from error
    return torch.from_numpy(mask).to(costs_RC.device)


def _array(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.ascontiguousarray(values.detach().to("cpu", torch.float64).numpy())


def _flags(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.ascontiguousarray(values.detach().to("cpu", torch.bool).numpy())


def _elements(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[Any]]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return np.ascontiguousarray(values.detach().to("cpu", dtype).numpy())


def _mask(values: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.ascontiguousarray(values.detach().cpu().numpy())
