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

from surgeon.costs import row_energy
from surgeon.kronsum import sum_product
from surgeon.linalg import block_cholesky, inverse_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# A layer of SmolLM2-135M at 50 % reaches its optimum in 50 to 100 steps.
MOST_STEPS = 200
STEP_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Removal:
    """New weights, and what they are predicted to cost.

    Attributes:
        W_RC: new weights, exactly zero where removed.
        cost: set cost, a scalar tensor; nats a token.
    """

    W_RC: Tensor
    cost: Tensor


def remove_rows(W_RC: Tensor, G_cholesky_RR: Tensor | None, A_CC: Tensor | None, rows: Tensor) -> Removal:
    """Optimum with the rows S at zero: ``W − G⁻¹[:,S] (G⁻¹[S,S])⁻¹ W[S,:]``; A cancels.

    The set cost is ``½ tr( (G⁻¹[S,S])⁻¹ W[S,:] A W[S,:]ᵀ )``.

    Args:
        W_RC: weights.
        G_cholesky_RR: lower Cholesky factor of the damped G; None for the identity, under which nothing else changes.
        A_CC: undamped, as in the costs of single rows; None for the identity.
        rows: indices S to remove.
    """
    if rows.numel() == 0:
        return Removal(W_RC, W_RC.new_zeros(()))
    if G_cholesky_RR is None:
        return Removal(W_RC.index_fill(0, rows, 0.0), 0.5 * row_energy(W_RC[rows], A_CC).sum())
    inverse_RS = inverse_columns(G_cholesky_RR, rows)
    W_SC = W_RC[rows].to(inverse_RS.dtype)
    Z_SC = torch.cholesky_solve(W_SC, block_cholesky(inverse_RS[rows]))
    new = (W_RC - (inverse_RS @ Z_SC).to(W_RC.dtype)).index_fill_(0, rows, 0.0)
    Z_SC = Z_SC.to(W_RC.dtype)
    return Removal(new, 0.5 * ((Z_SC if A_CC is None else Z_SC @ A_CC) * W_RC[rows]).sum())


def remove_columns(W_RC: Tensor, A_cholesky_CC: Tensor | None, G_RR: Tensor | None, columns: Tensor) -> Removal:
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
    W_RC: Tensor,
    keep_RC: Tensor,
    terms: Sequence[tuple[Tensor | None, Tensor | None]],
    *,
    steps: int = MOST_STEPS,
    tolerance: float = STEP_TOLERANCE,
) -> ElementUpdate:
    """Optimum with single weights at zero, by preconditioned conjugate gradients over the whole matrix.

    Solves ``M∘(Σ G X A) = M∘(Σ G W A)``, ``X = M∘X``, with the diagonal preconditioner
    ``1 / Σ G_rr A_cc`` and the start ``M∘W``. Only dense products ``G P A``; no system of the size
    of the removed set. The loss itself says when to stop: the residual is a poor guide.

    Args:
        W_RC: weights.
        keep_RC: bool, M.
        terms: damped ``(G, A)`` of each Kronecker product, None for the identity.
        steps: at most so many steps.
        tolerance: stop when ten steps together lower the quadratic loss by less than this fraction.
    """
    M = keep_RC.to(W_RC.dtype)
    X = W_RC * M
    # Residual of the normal equations on the kept weights: M∘(G (W − X) A).
    D = W_RC - X
    GDA = sum_product(terms, D)
    increase = 0.5 * float((D * GDA).sum())
    increases = [increase]
    residual = M * GDA
    preconditioner = M / _kronecker_diagonal(terms, W_RC)
    Z = preconditioner * residual
    P = Z.clone()
    rho = float((residual * Z).sum())
    for _ in range(steps):
        if rho <= 0.0:
            break
        GPA = sum_product(terms, P)
        curvature = float((P * GPA).sum())
        if curvature <= 0.0:
            break
        alpha = rho / curvature
        X.add_(P, alpha=alpha)
        residual.sub_(M * GPA, alpha=alpha)
        # f(X + αP) = f(X) − α⟨r, P⟩ + ½α²⟨P, GPA⟩ = f(X) − ½ ρ²/⟨P, GPA⟩.
        increase -= 0.5 * rho * rho / curvature
        increases.append(increase)
        if len(increases) > 10 and increases[-11] - increase <= tolerance * max(increases[-11], 0.0):
            break
        torch.mul(preconditioner, residual, out=Z)
        rho, previous = float((residual * Z).sum()), rho
        P.mul_(rho / previous).add_(Z)
    return ElementUpdate(X, increases)


def remove_elements_chunked(
    W_RC: Tensor, keep_RC: Tensor, G_cholesky_RR: Tensor | None, A_cholesky_CC: Tensor | None, *, chunk: int
) -> Tensor:
    """The paper's truncation: removed weights in chunks that know nothing of each other.

    Each chunk Q, in row-major order, solves ``(G⁻¹[r,r] ∘ A⁻¹[c,c]) z = w_Q``; then
    ``δW = −G⁻¹ Z A⁻¹`` with all z scattered into one Z (LLM Surgeon, section 3.4, ``max_correlate``).

    Args:
        W_RC: weights.
        keep_RC: bool.
        G_cholesky_RR: lower Cholesky factor of the damped G; None for the identity.
        A_cholesky_CC: the same for A.
        chunk: weights of a solve.

    Returns:
        New weights, exactly zero where removed.
    """
    inverses = [
        torch.eye(n, dtype=W_RC.dtype, device=W_RC.device) if L_nn is None else torch.cholesky_inverse(L_nn)
        for n, L_nn in zip(W_RC.shape, (G_cholesky_RR, A_cholesky_CC), strict=True)
    ]
    G_inverse, A_inverse = inverses
    Z = W_RC.new_zeros(W_RC.shape, dtype=torch.promote_types(G_inverse.dtype, A_inverse.dtype))
    rows, columns = (~keep_RC & (W_RC != 0)).nonzero(as_tuple=True)
    for r, c in zip(torch.split(rows, chunk), torch.split(columns, chunk), strict=True):
        system = G_inverse[r[:, None], r] * A_inverse[c[:, None], c]
        w = W_RC[r, c].to(system.dtype).unsqueeze(1)
        Z[r, c] = torch.cholesky_solve(w, block_cholesky(system)).squeeze(1)
    new = W_RC - (G_inverse.to(Z.dtype) @ Z @ A_inverse.to(Z.dtype)).to(W_RC.dtype)
    return new * keep_RC


def _kronecker_diagonal(terms: Sequence[tuple[Tensor | None, Tensor | None]], W_RC: Tensor) -> Tensor:
    """``Σ G_rr A_cc [R, C]``."""
    total = torch.zeros_like(W_RC)
    for G_RR, A_CC in terms:
        g = W_RC.new_ones(W_RC.shape[0]) if G_RR is None else G_RR.diagonal()
        a = W_RC.new_ones(W_RC.shape[1]) if A_CC is None else A_CC.diagonal()
        total.addr_(g, a)
    return total
