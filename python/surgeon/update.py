"""Joint updates: the kept weights that make up best for what was removed. Pure tensor mathematics.

All functions take the *alive* sub-matrices of one layer and return new tensors. The quadratic model
is ``½ tr(G Δ A Δᵀ)`` with the damped factors.

Rows k and columns l that stay together have the optimum ``W'_kl = G_kk⁻¹ G_k: W A_:l A_ll⁻¹``: the
objective separates, so it is :func:`remove_rows` and then :func:`remove_columns` on the *updated*
weights. Adding two updates that both start from the old W is not the optimum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.linalg import inverse_columns

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Removal:
    """New weights, and what they are predicted to cost.

    Attributes:
        W_RC: new weights, exactly zero where removed.
        cost: set cost, a scalar tensor; nats a token.
    """

    W_RC: Tensor
    cost: Tensor


def remove_rows(W_RC: Tensor, G_cholesky_RR: Tensor, A_CC: Tensor, rows: Tensor) -> Removal:
    """Optimum with the rows S at zero: ``W − G⁻¹[:,S] (G⁻¹[S,S])⁻¹ W[S,:]``; A cancels.

    The set cost is ``½ tr( (G⁻¹[S,S])⁻¹ W[S,:] A W[S,:]ᵀ )``.

    Args:
        W_RC: weights.
        G_cholesky_RR: lower Cholesky factor of the damped G.
        A_CC: undamped, as in the costs of single rows.
        rows: indices S to remove.
    """
    if rows.numel() == 0:
        return Removal(W_RC, W_RC.new_zeros(()))
    inverse_RS = inverse_columns(G_cholesky_RR, rows)
    W_SC = W_RC[rows].to(inverse_RS.dtype)
    Z_SC = torch.cholesky_solve(W_SC, torch.linalg.cholesky(inverse_RS[rows]))
    new = (W_RC - (inverse_RS @ Z_SC).to(W_RC.dtype)).index_fill_(0, rows, 0.0)
    Z_SC = Z_SC.to(W_RC.dtype)
    return Removal(new, 0.5 * ((Z_SC @ A_CC) * W_RC[rows]).sum())


def remove_columns(W_RC: Tensor, A_cholesky_CC: Tensor, G_RR: Tensor, columns: Tensor) -> Removal:
    """Optimum with the columns S at zero: ``W − W[:,S] (A⁻¹[S,S])⁻¹ A⁻¹[S,:]``; G cancels.

    The mirror image of :func:`remove_rows`, with set cost ``½ tr( (A⁻¹[S,S])⁻¹ (Wᵀ G W)[S,S] )``.
    """
    mirrored = remove_rows(W_RC.T, A_cholesky_CC, G_RR, columns)
    return Removal(mirrored.W_RC.T.contiguous(), mirrored.cost)


@dataclass(frozen=True)
class ElementUpdate:
    """Result of :func:`remove_elements`.

    Attributes:
        W_RC: new weights, exactly zero where removed.
        increases: ``½ tr(G Δ A Δᵀ)`` after each step, the start first.
    """

    W_RC: Tensor
    increases: list[float]


def remove_elements(
    W_RC: Tensor, keep_RC: Tensor, G_RR: Tensor, A_CC: Tensor, *, steps: int, tolerance: float
) -> ElementUpdate:
    """Optimum with single weights at zero, by preconditioned conjugate gradients over the whole matrix.

    Solves ``M∘(G X A) = M∘(G W A)``, ``X = M∘X``, with the diagonal preconditioner
    ``1 / (G_rr A_cc)`` and the start ``M∘W``. Only dense products ``G P A``; no system of the size
    of the removed set.

    Args:
        W_RC: weights.
        keep_RC: bool, M.
        G_RR: damped G.
        A_CC: damped A.
        steps: at most so many steps.
        tolerance: stop when ten steps together lower the quadratic loss by less than this fraction.
    """
    M = keep_RC.to(W_RC.dtype)
    X = W_RC * M
    # Residual of the normal equations on the kept weights: M∘(G (W − X) A).
    D = W_RC - X
    GDA = G_RR @ D @ A_CC
    increase = 0.5 * float((D * GDA).sum())
    increases = [increase]
    residual = M * GDA
    preconditioner = M / (G_RR.diagonal()[:, None] * A_CC.diagonal()[None, :])
    Z = preconditioner * residual
    P = Z
    rho = float((residual * Z).sum())
    for _ in range(steps):
        if rho <= 0.0:
            break
        GPA = G_RR @ P @ A_CC
        curvature = float((P * GPA).sum())
        if curvature <= 0.0:
            break
        alpha = rho / curvature
        X = X + alpha * P
        residual = residual - alpha * (M * GPA)
        # f(X + αP) = f(X) − α⟨r, P⟩ + ½α²⟨P, GPA⟩ = f(X) − ½ ρ²/⟨P, GPA⟩.
        increase -= 0.5 * rho * rho / curvature
        increases.append(increase)
        if len(increases) > 10 and increases[-11] - increase <= tolerance * max(increases[-11], 0.0):
            break
        Z = preconditioner * residual
        rho, previous = float((residual * Z).sum()), rho
        P = Z + (rho / previous) * P
    return ElementUpdate(X, increases)
