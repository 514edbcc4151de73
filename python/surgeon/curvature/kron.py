"""The nearest Kronecker product to the Fisher of a layer, or a sum of several.

With ``g_n, a_n`` of token n, ``F = (1/N) Σ_n (g_n g_nᵀ) ⊗ (a_n a_nᵀ)``. Rearranged to the matrix
``(1/N) Σ_n vec(g_n g_nᵀ) vec(a_n a_nᵀ)ᵀ``, the nearest ``Σ_k G_k ⊗ A_k`` in the Frobenius norm is
its truncated singular value decomposition (Van Loan & Pitsianis 1993). That matrix is never formed:
power iteration needs its products with ``vec(Ã)`` and ``vec(G̃)`` only, a sum over the tokens each
(LLM Surgeon, section 3.1 and appendix):

    G <- (1/N) Σ (aᵀÃa) g gᵀ − Σ_r ⟨A_r, Ã⟩ G_r        normalised to G̃, ‖G̃‖_F = 1
    A <- (1/N) Σ (gᵀG̃g) a aᵀ − Σ_r ⟨G_r, G̃⟩ A_r        σ = ‖A‖_F, normalised to Ã

where r runs over the terms found before (deflation). A term's factors are ``√σ G̃`` and ``√σ Ã``:
the scale of F, as with K-FAC. Each half step is the best answer to the other factor, so every term
lowers ``‖F − Σ G_k ⊗ A_k‖²_F`` by its σ², however few the iterations, and the first is better than
K-FAC from its first half step on.

*Start.* The first term starts from K-FAC's A; the first half step needs no G. Any later one starts
from the last change of Ã in the term before, freed of the Ã found: an iterate moves along the
singular vectors that have not died out yet, most of all along the next one, so this start has the
iterations of the term before already behind it. On the small models in this package it leaves less
of F than K-FAC's A freed of the Ã found, and that less than a random positive definite matrix at
equal iterations; K-FAC's A as it is wastes the first iteration. If the change is no more than
rounding, K-FAC's A freed of the Ã found takes its place.

*Signs.* σ is a norm, never negative. The first term stays positive semi-definite, as its start is:
sums of outer products with weights that are not negative. Later terms are symmetric but indefinite;
a sign is carried by their factors. So may be the sum: nearer to F in norm is not positive. On the
small models in this package two terms were indefinite in every layer at relative damping 0.1 (G) and
0.01 (A), and at 1 and 1 in most; whoever inverts a sum has to look
(:func:`surgeon.kronsum.two_terms` does).

*A term that is zero.* When a half step leaves nothing (in the first term exactly nothing, in later
ones no more than :data:`NEGLIGIBLE` times the machine precision times the first σ, which is what
rounding leaves), or no start is left, the layer's sum ends there and has fewer terms. A layer whose
first term is zero has zero factors: it is dead in the data's eyes.

*Cost.* ``1 + 2 · iterations · terms`` passes over the data, the first forward only. A is not shared
between layers, as each weights the tokens in its own way: one ``[C, C]`` and one ``[R, R]`` a layer
and term. Several terms also need one more ``[C, C]`` a layer and K-FAC's shared A for their starts.
A half step for G keeps one number a token and layer; one for A keeps the inputs of a batch until
their layer's gradients arrive (references to activations, not copies).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from surgeon.curvature.base import DEFAULT_OPTIONS, CurvatureFactors, LayerFactors, register
from surgeon.curvature.hooks import Collector
from surgeon.curvature.moments import moment_factors, require_curvature
from surgeon.curvature.passes import Spread, require_windows, run_pass
from surgeon.errors import NonFiniteError, SurgeonError
from surgeon.linalg import MOMENT_BLOCK, mirror_upper_

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.curvature.base import CurvatureOptions
    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer

NEGLIGIBLE = 100.0
G, A = 0, 1  # sides of a product


@dataclass
class _Term:
    """One product, ``σ · G̃ ⊗ Ã``.

    Attributes:
        sides: G̃ and Ã; in a half step one is read and the other is its accumulator.
        sigma: norm of the last half step.
        before: Ã one iteration ago, where a further term will need it.
    """

    sides: tuple[Tensor, Tensor]
    sigma: float = 0.0
    before: Tensor | None = None


@dataclass
class _Sum:
    """A layer's terms: those that are found, and the one that is being found, if any."""

    layer: PrunableLayer
    found: list[_Term] = field(default_factory=list)
    term: _Term | None = None

    def begin(self, A_CC: Tensor) -> None:
        """Begin the next term, if there is one.

        Args:
            A_CC: K-FAC's.
        """
        if not self.found:
            start = _unit(A_CC)
        else:
            last = self.found[-1]
            assert last.before is not None
            start = self._freed(last.sides[A] - last.before)
            last.before = None
            if start is None:
                start = self._freed(A_CC / torch.linalg.norm(A_CC))
        if start is not None:
            rows = self.layer.rows
            self.term = _Term((start.new_zeros(rows, rows), start))

    def finish_half_step(self, side: int, count: int) -> None:
        """Scale a sum over tokens, deflate, normalise; drop the term if nothing is left.

        Args:
            side: the factor that was summed up.
            count: tokens times draws.

        Raises:
            NonFiniteError: the sum overflowed.
        """
        assert self.term is not None
        M, other = mirror_upper_(self.term.sides[side]).div_(count), self.term.sides[1 - side]
        for known in self.found:
            M.sub_(known.sides[side], alpha=known.sigma * _inner(known.sides[1 - side], other))
        sigma = float(torch.linalg.norm(M))
        if not math.isfinite(sigma):
            name = self.layer.name
            raise NonFiniteError(f"Kronecker factor {'GA'[side]} of layer {name} is not finite", layer=name)
        if sigma <= (NEGLIGIBLE * torch.finfo(M.dtype).eps * self.found[0].sigma if self.found else 0.0):
            self.term = None
            return
        M.div_(sigma)
        self.term.sigma = sigma

    def _freed(self, M_CC: Tensor) -> Tensor | None:
        """A start orthogonal to the terms found, of norm 1; None if it is rounding. ``M_CC`` is of order 1."""
        for _ in range(2):  # once more for what rounding left the first time
            for known in self.found:
                M_CC = M_CC - _inner(known.sides[A], M_CC) * known.sides[A]
        return _unit(M_CC, least=NEGLIGIBLE * torch.finfo(M_CC.dtype).eps)

    def factors(self, key: str) -> LayerFactors:
        """The terms found, scaled by √σ in place."""
        pairs = []
        for term in self.found:
            for side in term.sides:
                side.mul_(math.sqrt(term.sigma))
            pairs.append(term.sides)
        if not pairs:
            weight, (rows, columns) = self.layer.weight, self.layer.shape
            pairs = [(weight.new_zeros(rows, rows), weight.new_zeros(columns, columns))]
        return LayerFactors(pairs[0][A], pairs[0][G], key, tuple(pairs[1:]))


class _HalfStep(Collector):
    """What both half steps have in common; layers without a term are only checked."""

    def __init__(self, layers: tuple[PrunableLayer, ...], *, dtype: torch.dtype, terms: dict[int, _Term]) -> None:
        super().__init__(layers, dtype=dtype)
        self._terms = terms
        self._weights: dict[int, Tensor] = {}

    def _forget(self) -> None:
        super()._forget()
        self._weights.clear()

    def _with_bias(self, index: int, X_NC: Tensor) -> Tensor:
        # A padded token's 1 does no harm: its gradient is zero, and so is its part of either sum.
        return torch.cat([X_NC, X_NC.new_ones(len(X_NC), 1)], 1) if self._layers[index].has_bias else X_NC


class _GradientStep(_HalfStep):
    """``G += Σ (aᵀÃa) g gᵀ``: of the inputs, one number a token is kept."""

    def _take_input(self, index: int, inputs: Tensor, *, shared: bool) -> None:
        X_NC = self._flat(inputs)
        if not shared:
            self._check_input(index, X_NC)
        if index in self._terms:
            self._weights[index] = quadratic_forms(self._with_bias(index, X_NC), self._terms[index].sides[A])

    def _take_gradient(self, index: int, X_NR: Tensor) -> None:
        if index in self._terms:
            add_weighted_moment_(self._terms[index].sides[G], X_NR, self._weights[index])


class _InputStep(_HalfStep):
    """``A += Σ (gᵀG̃g) a aᵀ``: inputs are kept until the last gradient of their layer has arrived.

    Over several draws of the labels the weights are added up first: the sum is linear in them.
    """

    def __init__(self, layers: tuple[PrunableLayer, ...], *, dtype: torch.dtype, terms: dict[int, _Term]) -> None:
        super().__init__(layers, dtype=dtype, terms=terms)
        self._kept: dict[int, tuple[Tensor, int]] = {}
        self._arrived: dict[int, int] = {}

    def _forget(self) -> None:
        super()._forget()
        self._kept.clear()
        self._arrived.clear()

    def _take_input(self, index: int, inputs: Tensor, *, shared: bool) -> None:
        if not shared:
            self._check_input(index, self._flat(inputs))
        if index in self._terms:
            self._kept[index] = (inputs.detach(), inputs._version)

    def _take_gradient(self, index: int, X_NR: Tensor) -> None:
        if index not in self._terms:
            return
        weights_N = quadratic_forms(X_NR, self._terms[index].sides[G])
        if index in self._weights:
            weights_N += self._weights[index]
        self._weights[index] = weights_N
        self._arrived[index] = self._arrived.get(index, 0) + 1
        if self._arrived[index] < self.samples:
            return
        inputs, version = self._kept.pop(index)
        if inputs._version != version:
            raise SurgeonError(
                f"the model overwrites the inputs of layer {self._layers[index].name} in place: "
                f"kron curvature cannot be estimated for it, kfac can"
            )
        X_NC = self._with_bias(index, self._flat(inputs))
        add_weighted_moment_(self._terms[index].sides[A], X_NC, self._weights.pop(index))


def kron(
    model: PreTrainedModel,
    layers: tuple[PrunableLayer, ...],
    windows: Windows | None,
    *,
    batch_tokens: int,
    accumulate: torch.dtype,
    advance: Callable[[int], None],
    options: CurvatureOptions = DEFAULT_OPTIONS,
) -> CurvatureFactors:
    """The nearest sum of ``options.terms`` Kronecker products to the Fisher of each layer.

    Args:
        model: weights frozen, eval mode.
        layers: the layers to watch.
        windows: calibration windows.
        batch_tokens: tokens a batch.
        accumulate: dtype of the moments.
        advance: called with counts that add up to the number of windows over all passes.
        options: Fisher, terms and iterations. Every pass sees the same draws of the labels.

    Returns:
        The first term as G and A, the others as ``more``; no two layers share an A.

    Raises:
        NonFiniteError: naming the layer and the window.
        ZeroCurvatureError: a layer was never reached, or every factor is zero.
        SurgeonError: the model overwrites a layer's inputs.
    """
    windows = require_windows(windows, "kron")
    spread = Spread(advance, windows=len(windows), passes=1 + 2 * options.iterations * options.terms)
    start = moment_factors(
        model, layers, windows, gradients=False, batch_tokens=batch_tokens, accumulate=accumulate, advance=spread
    )
    sums = [_Sum(layer) for layer in layers]
    for number in range(1, options.terms + 1):
        for each, factors in zip(sums, start.layers, strict=True):
            if len(each.found) == number - 1:
                assert factors.A_CC is not None
                each.begin(factors.A_CC)
        for iteration in range(1, options.iterations + 1):
            for side in (G, A):
                terms = {index: each.term for index, each in enumerate(sums) if each.term is not None}
                if not terms:
                    break
                for term in terms.values():
                    if side == A and iteration == options.iterations and number < options.terms:
                        term.before = term.sides[A].clone()
                    term.sides[side].zero_()
                with (_GradientStep, _InputStep)[side](layers, dtype=accumulate, terms=terms) as collector:
                    run_pass(model, windows, collector, batch_tokens=batch_tokens, advance=spread, options=options)
                for index in terms:
                    sums[index].finish_half_step(side, collector.tokens * collector.samples)
        for each in sums:
            if each.term is not None:
                each.found.append(each.term)
                each.term = None
    spread.finish()
    found = [each.factors(f"{index}:{each.layer.columns}") for index, each in enumerate(sums)]
    require_curvature("Fisher blocks", [factors.A_CC for factors in found])
    return CurvatureFactors(found, tokens=start.tokens, loss=start.loss)


def quadratic_forms(X_Nn: Tensor, S_nn: Tensor) -> Tensor:
    """``xᵀ S x`` of each row x, ``[N]``."""
    return ((X_Nn @ S_nn) * X_Nn).sum(1)


def add_weighted_moment_(M_nn: Tensor, X_Nn: Tensor, weights_N: Tensor) -> None:
    """``M += Σ w x xᵀ``, upper block triangle only; :func:`~surgeon.linalg.mirror_upper_` completes it.

    The weights may be negative, so there is no square root to take.
    """
    n = M_nn.shape[0]
    Y_Nn = X_Nn * weights_N[:, None]
    step = n if n < 2 * MOMENT_BLOCK else MOMENT_BLOCK
    for start in range(0, n, step):
        stop = min(start + step, n)
        M_nn[start:stop, start:].addmm_(X_Nn[:, start:stop].T, Y_Nn[:, start:])


def _inner(X: Tensor, Y: Tensor) -> float:
    return float(torch.dot(X.flatten(), Y.flatten()))


def _unit(M_CC: Tensor, *, least: float = 0.0) -> Tensor | None:
    """A copy of norm 1; None if the norm is ``least`` or less."""
    norm = torch.linalg.norm(M_CC)
    return (M_CC / norm).contiguous() if float(norm) > least else None


register("kron", kron)
