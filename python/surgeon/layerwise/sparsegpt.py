"""SparseGPT: columns one after the other, the columns behind making up for what goes.

E. Frantar, D. Alistarh: *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
ICML 2023, arXiv 2301.00774, algorithm 1. Pure tensor mathematics.

The loss of a layer is ``tr(Δ A Δᵀ)``, rows apart from each other. Column j is fixed after columns
``0 … j − 1``; with F the columns from j on, removing ``w_j`` costs ``w_j² / [(A_FF)⁻¹]_00`` and moves
``w_F`` by ``−w_j / [(A_FF)⁻¹]_00 · [(A_FF)⁻¹]_0:`` (OBS). All these inverses are read off one upper
triangular U with ``A⁻¹ = UᵀU``: ``[(A_FF)⁻¹]_00 = U_jj²`` and ``[(A_FF)⁻¹]_0: = U_jj U_j,F``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import NonFiniteError, SelectionError
from surgeon.layerwise.ranking import keep_largest, removed_count
from surgeon.linalg import damped_cholesky, solve_dtype
from surgeon.select import nm_keep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class InverseFactor:
    """What elimination reads off A; layers with the same inputs may share one.

    Attributes:
        U_CC: upper triangular, ``UᵀU`` is the inverse of the damped A.
        dead: bool ``[C]``, inputs that are always zero.
        asked: relative damping asked for.
        relative: relative damping that was needed.
        ladder_step: 0 if what was asked for was enough, else how many steps up the damping ladder.
    """

    U_CC: Tensor
    dead: Tensor
    asked: float
    relative: float
    ladder_step: int


def inverse_factor(A_CC: Tensor, damping: float = 0.01, *, layer: str | None = None) -> InverseFactor:
    """Factor the inverse of A, damped by ``damping`` times the mean of its live diagonal.

    A dead input (``A_cc = 0``) gets that mean on its diagonal: it stays apart from all others, and
    neither the damping nor the scale of A depends on it.

    Args:
        A_CC: second moment of the inputs, without the bias; any scale.
        damping: relative.
        layer: layer name, for messages.

    Raises:
        NonFiniteError: A is not finite.
        SingularFactorError: not positive definite after the last step of the damping ladder.
    """
    _check_finite(A_CC, f"element {{}} of the curvature factor A of layer {layer}", layer)
    diagonal = A_CC.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    H_CC = A_CC.to(solve_dtype(A_CC, damping), copy=True)
    H_CC.diagonal()[dead] = live.mean().to(H_CC.dtype) if live.numel() else 1.0
    # A lower factor of A read from its far corner is an upper factor R of A itself, A = R Rᵀ; then
    # A⁻¹ = R⁻ᵀ R⁻¹ and U = R⁻¹: one factorisation and no inverse in between to lose digits in.
    cholesky = damped_cholesky(H_CC.flip(0, 1), damping, what="A", layer=layer)
    identity = torch.eye(H_CC.shape[0], dtype=H_CC.dtype, device=H_CC.device)
    U_CC = torch.linalg.solve_triangular(cholesky.L_nn, identity, upper=False).flip(0, 1)
    return InverseFactor(U_CC, dead, damping, cholesky.relative, cholesky.ladder_step)


def sparsegpt(
    W_RC: Tensor,
    A_CC: Tensor,
    *,
    fraction: float | None,
    pattern: tuple[int, int] | None,
    damping: float = 0.01,
    block: int = 128,
    layer: str | None = None,
) -> Tensor:
    """Prune one layer: :func:`inverse_factor` and :func:`eliminate`, which see.

    Args:
        W_RC: weights, without the bias.
        A_CC: second moment of their inputs, any scale.
        fraction: part to remove; None if a pattern is given.
        pattern: ``(N, M)``; None if a fraction is given.
        damping: relative damping of A.
        block: columns over which a fraction is kept to.
        layer: layer name, for messages.

    Returns:
        New weights, same shape and dtype, exactly zero where removed.

    Raises:
        NonFiniteError: weights or A are not finite.
        SingularFactorError: A stayed indefinite.
        SelectionError: not exactly one of fraction and pattern, or one that makes no sense.
    """
    factor = inverse_factor(A_CC, damping, layer=layer)
    return eliminate(W_RC, factor, fraction=fraction, pattern=pattern, block=block, layer=layer)


def eliminate(
    W_RC: Tensor,
    factor: InverseFactor,
    *,
    fraction: float | None,
    pattern: tuple[int, int] | None,
    block: int = 128,
    layer: str | None = None,
) -> Tensor:
    """Remove weights column by column, each time moving the columns behind to the optimum.

    Which ones go:

    * ``fraction``: in each block of columns, from the weights as they are when it is reached, the
      ``⌈fraction · R · columns⌉`` with the smallest ``w² / U_jj²``.
    * ``pattern`` (N, M): N of M stay, chosen for each group of M columns when it is reached. A short
      last group keeps at most N. Blocks are cut to whole groups, which changes no result.

    Among equal ones the lower (row, column) goes first. Weights that are zero on entry stay zero, and
    so do those of dead inputs; they go before all others and count.

    Args:
        W_RC: weights, without the bias.
        factor: of their inputs.
        fraction: part to remove; None if a pattern is given.
        pattern: ``(N, M)``; None if a fraction is given.
        block: columns over which a fraction is kept to.
        layer: layer name, for messages.

    Returns:
        New weights, same shape and dtype, exactly zero where removed.

    Raises:
        NonFiniteError: a weight is not finite, or became so.
        SelectionError: not exactly one of fraction and pattern, or one that makes no sense.
    """
    if (fraction is None) == (pattern is None):
        raise SelectionError("give either a fraction to remove or an N:M pattern")
    if pattern is not None and not 1 <= pattern[0] < pattern[1]:
        raise SelectionError(f"{pattern[0]} of {pattern[1]} cannot be kept: at least 1 and fewer than all must be")
    if block < 1:
        raise SelectionError(f"a block must have at least one column, not {block}")
    _check_finite(W_RC, f"weight {{}} of layer {layer}", layer)
    group = 1 if pattern is None else pattern[1]
    step = max(block // group, 1) * group
    U_CC = factor.U_CC.to(W_RC.dtype)
    # Columns are walked one by one: as rows of the transpose each lies in one piece.
    W_CR = W_RC.T.clone(memory_format=torch.contiguous_format)
    W_CR[factor.dead] = 0.0
    zero_CR = W_CR == 0
    for start in range(0, W_CR.shape[0], step):
        stop = min(start + step, W_CR.shape[0])
        E_BR = _eliminate_block(
            W_CR[start:stop],
            zero_CR[start:stop],
            U_CC[start:stop, start:stop],
            fraction=fraction,
            pattern=pattern,
            layer=layer,
        )
        W_CR[stop:].addmm_(U_CC[start:stop, stop:].T, E_BR, alpha=-1.0)
    new_RC = W_CR.T.contiguous()
    _check_finite(new_RC, f"new weight {{}} of layer {layer}", layer)
    return new_RC


def _eliminate_block(
    W_BR: Tensor,
    zero_BR: Tensor,
    U_BB: Tensor,
    *,
    fraction: float | None,
    pattern: tuple[int, int] | None,
    layer: str | None,
) -> Tensor:
    """Eliminate within a block of columns, in place; returns the errors that the columns behind it take over."""
    columns, rows = W_BR.shape
    gone_BR = zero_BR.clone()
    if fraction is not None:
        # What is zero already may be more than what is asked for: it stays zero all the same.
        removed = max(removed_count(rows * columns, fraction), int(zero_BR.sum()))
        costs = _costs(W_BR, zero_BR, U_BB).reshape(1, -1)
        gone_BR = ~keep_largest(costs, removed, layer=layer).reshape(rows, columns).T
    E_BR = torch.zeros_like(W_BR)
    for j in range(columns):
        if pattern is not None and j % pattern[1] == 0:
            members = slice(j, min(j + pattern[1], columns))
            costs = _costs(W_BR[members], zero_BR[members], U_BB[members, members])
            gone_BR[members] |= ~nm_keep(costs, *pattern, layer=layer).T
        E_BR[j] = torch.where(gone_BR[j], W_BR[j], 0.0) / U_BB[j, j]
        W_BR[j].masked_fill_(gone_BR[j], 0.0)
        W_BR[j + 1 :].addr_(U_BB[j, j + 1 :], E_BR[j], alpha=-1.0)
    return E_BR


def _costs(W_BR: Tensor, zero_BR: Tensor, U_BB: Tensor) -> Tensor:
    """``w² / U_jj²``, ``[R, B]``; below all others where zero on entry, whatever has moved in since."""
    return (W_BR / U_BB.diagonal()[:, None]).square().masked_fill(zero_BR, -1.0).T


def _check_finite(M: Tensor, what: str, layer: str | None) -> None:
    bad = ~torch.isfinite(M)
    if bad.any():
        index = int(bad.flatten().nonzero()[0])
        raise NonFiniteError(f"{what.format(index)} is not finite", layer=layer, index=index)
