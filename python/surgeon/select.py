"""Selection: tensors in, tensors out, around the Rust core that sorts, counts and breaks ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from surgeon import _core
from surgeon.errors import NonFiniteCostError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        name = names[error.layer]
        raise NonFiniteError(
            f"cost of {error.kind} {error.index} of layer {name} is {error.value}",
            layer=name,
            index=error.index,
        ) from error
    return RowColumnSelection(
        keep_rows=[torch.from_numpy(keep) for keep in found.keep_rows],
        keep_columns=[torch.from_numpy(keep) for keep in found.keep_columns],
        removed=found.removed,
        threshold=found.threshold,
        units=found.units_removed,
    )


def _array(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.ascontiguousarray(values.detach().to("cpu", torch.float64).numpy())


def _flags(values: Tensor) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    return np.ascontiguousarray(values.detach().to("cpu", torch.bool).numpy())
