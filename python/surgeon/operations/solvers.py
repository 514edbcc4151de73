"""Factors of one layer on what is alive of it: sub-matrices, damped Cholesky factors, inverse diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgeon.costs import quadratic_increase
from surgeon.kronsum import two_terms
from surgeon.linalg import Cholesky, damped_cholesky, inverse_diagonal, solve_dtype
from surgeon.operations.base import DampingEvent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.curvature import LayerFactors
    from surgeon.kronsum import TwoTerms
    from surgeon.layers import PrunableLayer


# Factor of a damping event that is no damping: the second Kronecker term was shrunk.
SECOND_TERM = "second term"


@dataclass(frozen=True)
class Alive:
    """What of a layer is still there.

    Attributes:
        rows: bool ``[R]``.
        columns: bool ``[C]``.
    """

    rows: Tensor
    columns: Tensor

    @property
    def none(self) -> bool:
        """Whether nothing is left."""
        return not bool(self.rows.any())

    def take(self, W_RC: Tensor) -> Tensor:
        """The alive sub-matrix."""
        return W_RC[self.rows][:, self.columns]

    def put(self, W_RC: Tensor, into_RC: Tensor) -> Tensor:
        """Write an alive sub-matrix into a full matrix, in place."""
        rows, columns = self.rows.nonzero().flatten(), self.columns.nonzero().flatten()
        into_RC[rows[:, None], columns[None, :]] = W_RC
        return into_RC


def find_alive(W_RC: Tensor, factors: LayerFactors) -> Alive:
    """A row is dead if it is all zero in W or if ``G_rr = 0``; a column likewise with A.

    Without alive rows there are no alive columns, and the other way round.
    """
    rows, columns = (W_RC != 0).any(1), (W_RC != 0).any(0)
    if factors.G_RR is not None:
        rows &= factors.G_RR.diagonal() > 0
    if factors.A_CC is not None:
        columns &= factors.A_CC.diagonal() > 0
    return close(rows, columns)


def close(rows: Tensor, columns: Tensor) -> Alive:
    """Alive rows and columns, none of either where there are none of the other."""
    return Alive(rows & columns.any(), columns & rows.any())


@dataclass(frozen=True)
class SubFactors:
    """Undamped factors on the alive sub-matrix; None is the identity.

    Attributes:
        A_CC: of the alive columns.
        G_RR: of the alive rows.
        a_key: equal for equal A and equal alive columns.
        more: further Kronecker terms ``(G, A)``.
    """

    A_CC: Tensor | None
    G_RR: Tensor | None
    a_key: tuple[str, bytes]
    more: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def terms(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """``(G, A)`` of every Kronecker term."""
        return ((self.G_RR, self.A_CC), *self.more)


def sub_factors(factors: LayerFactors, alive: Alive) -> SubFactors:
    """The factors of the alive sub-matrix; the very same tensors where all is alive."""
    return SubFactors(
        _sub(factors.A_CC, alive.columns),
        _sub(factors.G_RR, alive.rows),
        (factors.a_key, alive.columns.cpu().numpy().tobytes()),
        tuple((_take(G_RR, alive.rows), _take(A_CC, alive.columns)) for G_RR, A_CC in factors.more),
    )


class Solvers:
    """Damped Cholesky factors of a shot's layers, and a record of every climb of the damping ladder.

    Args:
        layers: by layer index.
        config: holds the damping.
    """

    def __init__(self, layers: Sequence[PrunableLayer], config: PruneConfig) -> None:
        self._layers = layers
        self._damping = {"A": config.damping_a, "G": config.damping_g}
        self.events: list[DampingEvent] = []
        self._seen: set[tuple[int, str]] = set()
        self._scales: dict[int, float] = {}  # of the second Kronecker term
        # The last A only: layers that share one follow each other.
        self._last_key: tuple[str, bytes] | None = None
        self._last: Cholesky | None = None
        self._last_inverse: Tensor | None = None

    def g(self, index: int, factors: SubFactors) -> Cholesky | None:
        """Factor of the damped G; None for the identity."""
        return None if factors.G_RR is None else self._cholesky(index, factors.G_RR, "G")

    def a(self, index: int, factors: SubFactors) -> Cholesky | None:
        """Factor of the damped A, made once for layers that share it; None for the identity."""
        if factors.A_CC is None:
            return None
        if self._last is None or self._last_key != factors.a_key:
            self._last, self._last_inverse = self._cholesky(index, factors.A_CC, "A"), None
            self._last_key = factors.a_key
        self._record(index, "A", self._last)
        return self._last

    def g_inverse(self, index: int, factors: SubFactors) -> Tensor | None:
        """``diag(G⁻¹) [R]``; None for the identity, whose inverse has ones there."""
        cholesky = self.g(index, factors)
        return None if cholesky is None else inverse_diagonal(cholesky.L_nn)

    def a_inverse(self, index: int, factors: SubFactors) -> Tensor | None:
        """``diag(A⁻¹) [C]``, the same."""
        cholesky = self.a(index, factors)
        if cholesky is None:
            return None
        if self._last_inverse is None:
            self._last_inverse = inverse_diagonal(cholesky.L_nn)
        return self._last_inverse

    def damped_terms(self, index: int, factors: SubFactors) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """``(G, A)`` of every term, the first with the damping that its Cholesky factors got."""
        damped: list[Tensor | None] = []
        for M_nn, cholesky in ((factors.G_RR, self.g(index, factors)), (factors.A_CC, self.a(index, factors))):
            if M_nn is None or cholesky is None:
                damped.append(None)
                continue
            added = M_nn.clone()
            added.diagonal().add_(cholesky.damping)
            damped.append(added)
        scale = self._scales.get(index, 1.0)
        return ((damped[0], damped[1]), *((scale * G_RR, A_CC) for G_RR, A_CC in factors.more))

    def increase(self, index: int, factors: SubFactors, D_RC: Tensor) -> float:
        """What the undamped quadratic model says that a change of the weights costs, nats a token."""
        found = float(quadratic_increase(D_RC, factors.A_CC, factors.G_RR))
        for G_RR, A_CC in factors.more:
            found += self._scales.get(index, 1.0) * float(quadratic_increase(D_RC, A_CC, G_RR))
        return found

    def two_terms(self, index: int, factors: SubFactors) -> TwoTerms:
        """The sum of two Kronecker products, the first damped, diagonalised for its inverse.

        How far the second had to be shrunk is recorded, and holds for :meth:`damped_terms` from now on.
        """
        self._scales.pop(index, None)
        first, second = self.damped_terms(index, factors)
        name = self._layers[index].name
        found = two_terms(_both(first), _both(second), layer=name)
        self._scales[index] = found.scale
        if found.shrink_step:
            self.events.append(DampingEvent(name, SECOND_TERM, 1.0, found.scale, found.shrink_step))
        return found

    def forget(self) -> None:
        """Drop what is held."""
        self._last_key = self._last = self._last_inverse = None

    def _cholesky(self, index: int, M_nn: Tensor, what: str) -> Cholesky:
        asked, name = self._damping[what], self._layers[index].name
        found = damped_cholesky(M_nn.to(solve_dtype(M_nn, asked)), asked, what=what, layer=name)
        self._record(index, what, found)
        return found

    def _record(self, index: int, what: str, found: Cholesky) -> None:
        if found.ladder_step and (index, what) not in self._seen:
            self._seen.add((index, what))
            name = self._layers[index].name
            self.events.append(DampingEvent(name, what, self._damping[what], found.relative, found.ladder_step))


def _sub(M_nn: Tensor | None, alive: Tensor) -> Tensor | None:
    return None if M_nn is None else _take(M_nn, alive)


def _take(M_nn: Tensor, alive: Tensor) -> Tensor:
    """Rows and columns of what is alive; the very same tensor if that is all."""
    if bool(alive.all()):
        return M_nn
    index = alive.nonzero().flatten()
    return M_nn[index[:, None], index[None, :]]


def _both(term: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    assert term[0] is not None and term[1] is not None, "sums have no identity factors"  # noqa: PT018
    return term[0], term[1]


def lower(cholesky: Cholesky | None) -> Tensor | None:
    """The lower factor itself; None for the identity."""
    return None if cholesky is None else cholesky.L_nn
