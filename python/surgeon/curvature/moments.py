"""Plain second moments of inputs and output gradients: what K-FAC and activation curvature are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.curvature.base import DEFAULT_OPTIONS, CurvatureFactors, LayerFactors
from surgeon.curvature.hooks import Collector
from surgeon.curvature.passes import run_pass
from surgeon.errors import ZeroCurvatureError
from surgeon.linalg import add_second_moment_, mirror_upper_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.curvature.base import CurvatureOptions
    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer


class MomentCollector(Collector):
    """Accumulates A, and G where gradients are wanted.

    * Layers that read the very same tensor share one A.
    * A bias is one more input that is always 1: its row of A is the sum of the inputs.
    * Inputs and gradients are consumed where they appear and never kept.
    * Sums are kept in the accumulator's dtype and divided by N at the end.

    Args:
        layers: the layers to watch.
        dtype: of the accumulators.
        gradients: whether G is wanted.
    """

    def __init__(self, layers: tuple[PrunableLayer, ...], *, dtype: torch.dtype, gradients: bool = True) -> None:
        super().__init__(layers, dtype=dtype, gradients=gradients)
        self._A: dict[int, Tensor] = {}  # by leader: sum of a aᵀ, upper blocks
        self._a: dict[int, Tensor] = {}  # by leader: sum of a
        self._G: dict[int, Tensor] = {}
        self._probing = False

    @torch.no_grad()
    def probe(self, model: PreTrainedModel, ids_BT: Tensor) -> None:
        """Find out who shares an input on a few tokens, then make all accumulators at once.

        Made one by one between the activations of a first batch they would hold the heap apart:
        a third more memory for the whole run.

        Raises:
            ZeroCurvatureError: a layer was never reached.
        """
        self._probing = True
        self._forget()
        model(input_ids=ids_BT, use_cache=False)
        self._forget()
        self._probing = False
        for index, layer in enumerate(self._layers):
            if index not in self._leader:
                raise ZeroCurvatureError(
                    f"layer {layer.name} was never reached by the calibration data", layer=layer.name
                )
            weight = layer.weight
            R, C = weight.shape
            if self._leader[index] == index:
                self._A[index] = weight.new_zeros(C, C, dtype=self._dtype)
                self._a[index] = weight.new_zeros(C, dtype=self._dtype)
            if self.gradients:
                self._G[index] = weight.new_zeros(R, R, dtype=self._dtype)

    def _take_input(self, index: int, inputs: Tensor, *, shared: bool) -> None:
        if shared or self._probing:
            return
        X_NC = self._flat(inputs)
        add_second_moment_(self._A[index], X_NC)
        self._a[index] += X_NC.sum(0)
        self._check_input(index, X_NC)

    def _take_gradient(self, index: int, X_NR: Tensor) -> None:
        add_second_moment_(self._G[index], X_NR)

    def input_moment(self, index: int) -> tuple[Tensor, int]:
        """``(A_CC, leader)`` of a layer, mean over the tokens, with the bias' row and column.

        Layers with the same leader and the same number of columns get the very same tensor.
        """
        leader = self._leader[index]
        sums = self._A[leader]
        if self._a[leader].numel():  # not yet finished: complete and scale once, in place
            mirror_upper_(sums).div_(self.tokens)
            mean = self._a[leader].div_(self.tokens)
            if any(self._layers[i].has_bias for i, of in self._leader.items() if of == leader):
                one = mean.new_ones(1)
                sums = torch.cat([torch.cat([sums, mean[:, None]], 1), torch.cat([mean, one])[None]], 0)
                self._A[leader] = sums
            self._a[leader] = mean.new_zeros(0)
        columns = self._layers[index].columns
        return sums[:columns, :columns], leader

    def gradient_moment(self, index: int) -> Tensor | None:
        """``G_RR`` of a layer, mean over the tokens and the draws of their labels. Call it once a layer.

        None if no gradients were wanted.
        """
        if not self.gradients:
            return None
        return mirror_upper_(self._G[index]).div_(self.tokens * self.samples)


def moment_factors(
    model: PreTrainedModel,
    layers: tuple[PrunableLayer, ...],
    windows: Windows,
    *,
    gradients: bool,
    batch_tokens: int,
    accumulate: torch.dtype,
    advance: Callable[[int], None],
    options: CurvatureOptions = DEFAULT_OPTIONS,
) -> CurvatureFactors:
    """A and, with ``gradients``, G of every layer over all windows, in one pass.

    Args:
        model: weights frozen, eval mode.
        layers: the layers to watch.
        windows: calibration windows.
        gradients: False to run forward only; G is the identity then.
        batch_tokens: tokens a batch.
        accumulate: dtype of the moments.
        advance: called with the number of windows just done.
        options: which Fisher, and how many draws.

    Raises:
        NonFiniteError: naming the layer and the window.
        ZeroCurvatureError: a layer was never reached, or every factor is zero.
    """
    with MomentCollector(layers, dtype=accumulate, gradients=gradients) as collector:
        collector.probe(model, windows.ids[:1, :2].to(model.device))
        loss = run_pass(model, windows, collector, batch_tokens=batch_tokens, advance=advance, options=options)
        factors = CurvatureFactors(tokens=collector.tokens, loss=loss)
        for index in range(len(layers)):
            A_CC, leader = collector.input_moment(index)
            factors.layers.append(LayerFactors(A_CC, collector.gradient_moment(index), f"{leader}:{A_CC.shape[0]}"))
    require_curvature("inputs", [f.A_CC for f in factors.layers])
    if gradients:
        require_curvature("output gradients", [f.G_RR for f in factors.layers])
    return factors


def require_curvature(what: str, factors: Iterable[Tensor | None]) -> None:
    """Refuse factors that are zero in every layer: everything would look dead.

    Raises:
        ZeroCurvatureError: they are.
    """
    if not any(factor is not None and bool(factor.diagonal().any()) for factor in factors):
        raise ZeroCurvatureError(f"the {what} of every layer are zero: nothing can be pruned by them")
