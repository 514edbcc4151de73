"""Joint updates: the kept weights that make up best for what was removed. Pure tensor mathematics.

All functions take the *alive* sub-matrices of one layer and return new tensors. The quadratic model
is ``½ tr(G Δ A Δᵀ)`` with the damped factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.linalg import inverse_columns

if TYPE_CHECKING:
    from torch import Tensor


def remove_rows(W_RC: Tensor, G_cholesky_RR: Tensor, rows: Tensor) -> Tensor:
    """Optimum with the rows at zero: ``W − G⁻¹[:,S] (G⁻¹[S,S])⁻¹ W[S,:]``; A cancels.

    Args:
        W_RC: weights.
        G_cholesky_RR: lower Cholesky factor of the damped G.
        rows: indices S to remove.
    """
    if rows.numel() == 0:
        return W_RC.clone()
    if rows.numel() == W_RC.shape[0]:
        return torch.zeros_like(W_RC)
    dtype = G_cholesky_RR.dtype
    columns = inverse_columns(G_cholesky_RR, rows)
    chol = torch.linalg.cholesky(columns[rows])
    z = torch.cholesky_solve(W_RC[rows].to(dtype), chol)
    new = (W_RC.to(dtype) - columns @ z).to(W_RC.dtype)
    new[rows] = 0.0
    return new


def remove_columns(W_RC: Tensor, A_cholesky_CC: Tensor, columns: Tensor) -> Tensor:
    """Optimum with the columns at zero: ``W − W[:,S] (A⁻¹[S,S])⁻¹ A⁻¹[S,:]``; G cancels.

    Args:
        W_RC: weights.
        A_cholesky_CC: lower Cholesky factor of the damped A.
        columns: indices S to remove.
    """
    return remove_rows(W_RC.T, A_cholesky_CC, columns).T.contiguous()


def remove_rows_columns(
    W_RC: Tensor, G_cholesky_RR: Tensor, A_cholesky_CC: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Optimum with rows and columns at zero: ``W'_kl = G_kk⁻¹ G_k: W A_:l A_ll⁻¹``.

    Rows first, then columns on the updated weights: the objective separates. Adding two updates
    that both start from the old W is not the optimum.
    """
    return remove_columns(remove_rows(W_RC, G_cholesky_RR, rows), A_cholesky_CC, columns)


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
