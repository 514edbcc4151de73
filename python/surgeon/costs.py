"""Costs: the predicted loss increase of removing one unit. Pure tensor mathematics.

LLM Surgeon, sections 3.2 and 3.3, and its appendix. All functions take the *alive* sub-matrices.
The numerators use the undamped factors, the inverses the damped ones. None as a factor or an inverse
is the identity. Results have the dtype of ``W_RC``.

Shapes: ``W_RC [R, C]``, ``A_CC [C, C]``, ``G_RR [R, R]``, ``g_inverse_R = diag(G⁻¹) [R]``,
``a_inverse_C = diag(A⁻¹) [C]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.linalg import block_cholesky

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def row_energy(W_RC: Tensor, A_CC: Tensor | None) -> Tensor:
    """``(W A Wᵀ)_rr [R]``, without the full product."""
    return (W_RC * W_RC).sum(1) if A_CC is None else ((W_RC @ A_CC) * W_RC).sum(1)


def column_energy(W_RC: Tensor, G_RR: Tensor | None) -> Tensor:
    """``(Wᵀ G W)_cc [C]``, without the full product."""
    return (W_RC * W_RC).sum(0) if G_RR is None else ((G_RR @ W_RC) * W_RC).sum(0)


def row_costs_obs(W_RC: Tensor, A_CC: Tensor | None, g_inverse_R: Tensor | None) -> Tensor:
    """``½ (W A Wᵀ)_rr / [G⁻¹]_rr``: with the update of the other rows."""
    return _over(0.5 * row_energy(W_RC, A_CC), g_inverse_R)


def column_costs_obs(W_RC: Tensor, G_RR: Tensor | None, a_inverse_C: Tensor | None) -> Tensor:
    """``½ (Wᵀ G W)_cc / [A⁻¹]_cc``: with the update of the other columns."""
    return _over(0.5 * column_energy(W_RC, G_RR), a_inverse_C)


def row_costs_obd(W_RC: Tensor, A_CC: Tensor | None, G_RR: Tensor | None) -> Tensor:
    """``½ (W A Wᵀ)_rr G_rr``: nothing else changes."""
    energy = 0.5 * row_energy(W_RC, A_CC)
    return energy if G_RR is None else energy * G_RR.diagonal()


def column_costs_obd(W_RC: Tensor, A_CC: Tensor | None, G_RR: Tensor | None) -> Tensor:
    """``½ (Wᵀ G W)_cc A_cc``: nothing else changes."""
    energy = 0.5 * column_energy(W_RC, G_RR)
    return energy if A_CC is None else energy * A_CC.diagonal()


def column_set_costs_obs(
    W_RC: Tensor, G_RR: Tensor | None, a_inverse_CC: Tensor | None, sets: Sequence[Tensor]
) -> Tensor:
    """``½ tr( ([A⁻¹]_SS)⁻¹ (Wᵀ G W)_SS )`` of sets of columns, each with the update of all others.

    Args:
        W_RC: weights.
        G_RR: undamped.
        a_inverse_CC: inverse of the damped A.
        sets: indices of each set; an empty one costs nothing.

    Returns:
        ``[len(sets)]``.
    """
    found = []
    for columns in sets:
        energy = _set_energy(W_RC, G_RR, columns)
        if a_inverse_CC is None or not columns.numel():
            found.append(0.5 * energy.diagonal().sum())
            continue
        block = a_inverse_CC[columns[:, None], columns[None, :]]
        solved = torch.cholesky_solve(energy.to(block.dtype), block_cholesky(block))
        found.append(0.5 * solved.diagonal().sum().to(W_RC.dtype))
    return torch.stack(found) if found else W_RC.new_zeros(0)


def column_set_costs_obd(W_RC: Tensor, A_CC: Tensor | None, G_RR: Tensor | None, sets: Sequence[Tensor]) -> Tensor:
    """``½ tr( A_SS (Wᵀ G W)_SS )`` of sets of columns: nothing else changes. ``[len(sets)]``."""
    found = []
    for columns in sets:
        energy = _set_energy(W_RC, G_RR, columns)
        block = energy.diagonal() if A_CC is None else A_CC[columns[:, None], columns[None, :]] * energy
        found.append(0.5 * block.sum())
    return torch.stack(found) if found else W_RC.new_zeros(0)


def _set_energy(W_RC: Tensor, G_RR: Tensor | None, columns: Tensor) -> Tensor:
    """``(Wᵀ G W)_SS``."""
    W_RS = W_RC[:, columns]
    return W_RS.T @ (W_RS if G_RR is None else G_RR @ W_RS)


def element_costs_obs(W_RC: Tensor, g_inverse_R: Tensor | None, a_inverse_C: Tensor | None) -> Tensor:
    """``½ W_rc² / ([G⁻¹]_rr [A⁻¹]_cc)``, ``[R, C]``."""
    R, C = (W_RC.new_ones(n) for n in W_RC.shape)
    return element_costs(W_RC, [(_over(R, g_inverse_R), _over(C, a_inverse_C))])


def element_costs(W_RC: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """``½ W_rc² Σ r_r c_c``, ``[R, C]``: all costs of single weights that a few vectors say."""
    scale = torch.zeros_like(W_RC)
    for r, c in pairs:
        scale.addr_(r, c)
    return scale.mul_(W_RC).mul_(W_RC).mul_(0.5)


def element_costs_obd(W_RC: Tensor, A_CC: Tensor | None, G_RR: Tensor | None) -> Tensor:
    """``½ W_rc² G_rr A_cc``, ``[R, C]``."""
    r, c = (
        W_RC.new_ones(n) if M_nn is None else M_nn.diagonal() for n, M_nn in zip(W_RC.shape, (G_RR, A_CC), strict=True)
    )
    return element_costs(W_RC, [(r, c)])


def _over(value: Tensor, inverse: Tensor | None) -> Tensor:
    return value if inverse is None else value / inverse.to(value.dtype)


def quadratic_increase(D_RC: Tensor, A_CC: Tensor | None, G_RR: Tensor | None) -> Tensor:
    """``½ tr(G Δ A Δᵀ)`` of a weight change Δ, a scalar: the model's loss increase."""
    left = D_RC if G_RR is None else G_RR @ D_RC
    right = D_RC if A_CC is None else D_RC @ A_CC
    return 0.5 * (left * right).sum()
