"""Pure linear algebra: moments, damping, Cholesky factors and what is read off them.

No I/O, no logging, no state. Shapes: ``n`` is the order of a factor, ``N`` counts tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import NonFiniteError, SingularFactorError

if TYPE_CHECKING:
    from torch import Tensor

# The damping ladder: the asked relative damping, then these multiples of it (of LADDER_FLOOR if that is
# more), one step after another until the Cholesky factorisation succeeds and no pivot is mere rounding.
LADDER: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
LADDER_FLOOR = 1e-8

# Below this condition number float32 factors serve: measured on SmolLM2-135M, the inverse's diagonal is
# then right to 1e-4 and mostly to 1e-5; beyond it errors reach 5e-3.
WELL_CONDITIONED = 5e4

# Column blocks of the triangular accumulation: half the arithmetic of a full product is saved as
# blocks shrink, but small products are slow; below twice this width a moment is one product.
MOMENT_BLOCK = 192


def add_second_moment_(M_nn: Tensor, X_Nn: Tensor) -> None:
    """``M += XᵀX``, upper block triangle only; :func:`mirror_upper_` completes it.

    A symmetric product needs half the arithmetic. The strict lower part of the blocks on the
    diagonal is written too, the blocks below them are not.

    Args:
        M_nn: accumulator, changed in place.
        X_Nn: N samples, same dtype as the accumulator.
    """
    n = M_nn.shape[0]
    step = n if n < 2 * MOMENT_BLOCK else MOMENT_BLOCK
    for start in range(0, n, step):
        stop = min(start + step, n)
        M_nn[start:stop, start:].addmm_(X_Nn[:, start:stop].T, X_Nn[:, start:])


def mirror_upper_(M_nn: Tensor) -> Tensor:
    """Copy the upper triangle onto the lower, in place."""
    n = M_nn.shape[0]
    for start in range(0, n, MOMENT_BLOCK):
        stop = min(start + MOMENT_BLOCK, n)
        block = M_nn[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        M_nn[stop:, start:stop].copy_(M_nn[start:stop, stop:].T)
    return M_nn


@dataclass(frozen=True)
class Cholesky:
    """Lower Cholesky factor of a damped matrix.

    Attributes:
        L_nn: ``L Lᵀ = M + damping · I``.
        damping: absolute damping that was added.
        relative: the relative damping it came from.
        ladder_step: 0 if the asked damping was enough, else how many steps up.
    """

    L_nn: Tensor
    damping: float
    relative: float
    ladder_step: int


def damped_cholesky(M_nn: Tensor, relative: float, *, what: str, layer: str | None = None) -> Cholesky:
    """Cholesky factor of ``M + λ · mean(diag M) · I``, climbing the damping ladder if it must.

    Args:
        M_nn: symmetric positive semi-definite.
        relative: λ, relative damping.
        what: ``"A"`` or ``"G"``, for messages.
        layer: layer name, for messages.

    Raises:
        NonFiniteError: ``M`` is not finite.
        SingularFactorError: not positive definite after the last step of the ladder.
    """
    n = M_nn.shape[0]
    if n == 0:
        return Cholesky(M_nn.clone(), 0.0, relative, 0)
    diagonal = M_nn.diagonal()
    if not torch.isfinite(M_nn).all():
        index = int((~torch.isfinite(M_nn)).any(1).nonzero()[0])
        raise NonFiniteError(
            f"curvature factor {what} of layer {layer} is not finite (row {index})", layer=layer, index=index
        )
    mean = float(diagonal.mean())
    for step, multiple in enumerate(LADDER):
        tried = max(relative, LADDER_FLOOR) * multiple if step else relative
        damped = M_nn.clone()
        damped.diagonal().add_(tried * mean)
        L_nn, failed = _factor(damped)
        if failed is None:
            return Cholesky(L_nn, tried * mean, tried, step)
    raise SingularFactorError(
        f"curvature factor {what} of layer {layer} is not positive definite even with relative damping {tried:g} "
        f"(asked: {relative:g}): give it more calibration samples or a larger --damping-{what.lower()}",
        layer=layer,
        index=failed,
    )


def block_cholesky(M_nn: Tensor) -> Tensor:
    """Lower Cholesky factor of a principal block of an inverse.

    Raises:
        SingularFactorError: it is not positive definite; ``index`` is the row.
    """
    L_nn, failed = _factor(M_nn)
    if failed is not None:
        raise SingularFactorError(
            f"a block of an inverse curvature factor is singular at row {failed}: give it more calibration samples or "
            "larger --damping-g and --damping-a",
            index=failed,
        )
    return L_nn


def _factor(M_nn: Tensor) -> tuple[Tensor, int | None]:
    """Cholesky factor, and the row where it failed or where nothing but rounding is left of the pivot."""
    L_nn, info = torch.linalg.cholesky_ex(M_nn)
    if int(info):
        return L_nn, int(info) - 1
    n = M_nn.shape[0]
    # float32 is only asked for where the condition number is known to be small (solve_dtype).
    digits = n if M_nn.dtype == torch.float64 else 10
    floor = digits * torch.finfo(M_nn.dtype).eps * M_nn.diagonal().max()
    lost = ~(L_nn.diagonal().square() > floor)  # NaN is lost too
    return L_nn, int(lost.nonzero()[0]) if bool(lost.any()) else None


def solve_dtype(M_nn: Tensor, relative: float) -> torch.dtype:
    """The dtype to factor a damped matrix in: its own, or float64 where conditioning asks.

    ``‖M‖₁ / (λ · mean diag)`` bounds the condition number of the damped matrix from above, at the
    price of one look at it.
    """
    if M_nn.dtype == torch.float64 or M_nn.numel() == 0:
        return M_nn.dtype
    damping = relative * float(M_nn.diagonal().mean())
    bound = float(M_nn.abs().sum(0).max())
    return M_nn.dtype if bound < WELL_CONDITIONED * damping else torch.float64


def inverse_diagonal(L_nn: Tensor) -> Tensor:
    """``diag(M⁻¹)`` from the lower Cholesky factor of M, ``[n]``."""
    return torch.cholesky_inverse(L_nn).diagonal()


def inverse_columns(L_nn: Tensor, index: Tensor) -> Tensor:
    """``M⁻¹[:, index]`` from the Cholesky factor of M, ``[n, len(index)]``."""
    n = L_nn.shape[0]
    rhs = torch.zeros(n, index.numel(), dtype=L_nn.dtype, device=L_nn.device)
    rhs[index, torch.arange(index.numel(), device=index.device)] = 1.0
    return torch.cholesky_solve(rhs, L_nn)
