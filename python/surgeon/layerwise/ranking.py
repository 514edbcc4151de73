"""How many go, and which: exact counts, and one rule for ties."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

import torch

from surgeon.errors import SelectionError
from surgeon.select import nm_keep

if TYPE_CHECKING:
    from torch import Tensor

# A float stands for every number this close to it: 0.3 for 3/10, 2/3 for two thirds.
_READING = Fraction(1, 10**12)


def removed_count(total: int, fraction: float) -> int:
    """``⌈fraction · total⌉`` in whole numbers: 0.3 of 10 is 3, 2/3 of 3 is 2.

    The smallest count whose part of ``total`` is ``fraction`` to twelve places, or more.

    Raises:
        SelectionError: unless ``0 <= fraction < 1``.
    """
    if not 0.0 <= fraction < 1.0:
        raise SelectionError(f"the fraction to remove must lie in [0, 1), not {fraction}")
    return max(0, ceil((Fraction(fraction) - _READING) * total))


def keep_largest(costs_RC: Tensor, removed: int, *, layer: str | None = None) -> Tensor:
    """Keep mask without the ``removed`` smallest costs of each row; among equal ones the lower index goes.

    Args:
        costs_RC: finite.
        removed: how many of the C go, ``0 <= removed <= C``.
        layer: layer name, for messages.

    Returns:
        bool ``[R, C]``.

    Raises:
        NonFiniteError: a cost is NaN or infinite.
    """
    columns = costs_RC.shape[1]
    if removed in (0, columns):
        return torch.full_like(costs_RC, removed == 0, dtype=torch.bool)
    return nm_keep(costs_RC, columns - removed, columns, layer=layer)
