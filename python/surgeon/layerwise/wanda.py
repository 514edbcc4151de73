"""Wanda: weights times the norms of their inputs, compared within each output row; no update.

M. Sun, Z. Liu, A. Bair, J. Z. Kolter: *A Simple and Effective Pruning Approach for Large Language
Models*, ICLR 2024, arXiv 2306.11695, equation 1. Pure tensor mathematics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.layerwise.ranking import keep_largest, removed_count
from surgeon.select import nm_keep

if TYPE_CHECKING:
    from torch import Tensor


def input_norms(A_CC: Tensor) -> Tensor:
    """``√A_cc``, the norm of each input over the tokens up to a constant factor, ``[C]``."""
    return A_CC.diagonal().sqrt()


def wanda_costs(W_RC: Tensor, norms_C: Tensor) -> Tensor:
    """``|W_rc| · ‖x_c‖₂``, ``[R, C]``. Weights that are zero cost nothing and so go first."""
    return W_RC.abs() * norms_C


def wanda_mask(W_RC: Tensor, norms_C: Tensor, fraction: float, *, layer: str | None = None) -> Tensor:
    """Keep mask: ``⌈fraction · C⌉`` of every row go, the cheapest; among equal ones the lower index.

    Args:
        W_RC: weights, without the bias.
        norms_C: norms of the inputs; any common factor.
        fraction: part of each row to remove, ``0 <= fraction < 1``.
        layer: layer name, for messages.

    Returns:
        bool ``[R, C]``.

    Raises:
        NonFiniteError: a cost is NaN or infinite.
        SelectionError: the fraction is out of range.
    """
    return keep_largest(wanda_costs(W_RC, norms_C), removed_count(W_RC.shape[1], fraction), layer=layer)


def wanda_nm_mask(W_RC: Tensor, norms_C: Tensor, keep: int, group: int, *, layer: str | None = None) -> Tensor:
    """Keep mask with ``keep`` of every ``group`` consecutive columns, the dearest ones.

    Groups start at column 0; a short last one keeps at most ``keep``.

    Args:
        W_RC: weights, without the bias.
        norms_C: norms of the inputs; any common factor.
        keep: N.
        group: M.
        layer: layer name, for messages.

    Returns:
        bool ``[R, C]``.

    Raises:
        NonFiniteError: a cost is NaN or infinite.
        SelectionError: a pattern that makes no sense.
    """
    return nm_keep(wanda_costs(W_RC, norms_C), keep, group, layer=layer)
