"""Hooks that turn a forward and a backward pass of the whole model into second moments.

The life cycle of the hooks lives here, apart from the mathematics. Inputs and gradients are
consumed where they appear and never kept.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Self

import torch

from surgeon.errors import NonFiniteError, SurgeonError, ZeroCurvatureError
from surgeon.linalg import add_second_moment_, mirror_upper_

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from surgeon.layers import PrunableLayer


class MomentCollector:
    """Accumulates A and G of layers while the model runs, as a context manager.

    * Weights need no gradient: a layer's output that does not require one yet is made to, so the
      backward pass computes activation gradients only, and none below the first layer.
    * Layers that read the very same tensor (q, k, v; gate, up) share one A, found by identity.
    * A bias is one more input that is always 1: its row of A is the sum of the inputs.
    * Sums are kept in the accumulator's dtype and divided by N at the end.

    Args:
        layers: the layers to watch.
        dtype: of the accumulators.
    """

    def __init__(self, layers: tuple[PrunableLayer, ...], *, dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._A: dict[int, Tensor] = {}  # by leader: sum of a aᵀ, upper blocks
        self._a: dict[int, Tensor] = {}  # by leader: sum of a
        self._G: dict[int, Tensor] = {}
        self._leader: dict[int, int] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._probing = False
        self._mask: Tensor | None = None
        self._batch = 1
        self._first_window = 0
        self._input_sums: dict[int, Tensor] = {}
        self._gradient_sums: dict[int, Tensor] = {}
        self.tokens = 0

    def __enter__(self) -> Self:
        """Register the hooks."""
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.module.register_forward_hook(self._forward_hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks, whatever happened."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    @torch.no_grad()
    def probe(self, model: PreTrainedModel, ids_BT: Tensor) -> None:
        """Find out who shares an input on a few tokens, then make all accumulators at once.

        Made one by one between the activations of a first batch they would hold the heap apart:
        a third more memory for the whole run.

        Raises:
            ZeroCurvatureError: a layer was never reached.
        """
        self._probing = True
        self._seen.clear()
        model(input_ids=ids_BT, use_cache=False)
        self._seen.clear()
        self._probing = False
        for index, layer in enumerate(self._layers):
            if index not in self._leader:
                raise self._unreached(index)
            weight = layer.module.weight
            R, C = weight.shape
            if self._leader[index] == index:
                self._A[index] = weight.new_zeros(C, C, dtype=self._dtype)
                self._a[index] = weight.new_zeros(C, dtype=self._dtype)
            self._G[index] = weight.new_zeros(R, R, dtype=self._dtype)

    def begin_batch(self, shape: tuple[int, int], *, first_window: int, mask_BT: Tensor | None = None) -> None:
        """Announce the next forward pass.

        Args:
            shape: (B, T), windows and tokens a window.
            first_window: index of its first window, for messages.
            mask_BT: True for real tokens, False for padding; None if nothing is padded.
        """
        self._batch = shape[0]
        self._first_window = first_window
        self._mask = None if mask_BT is None else mask_BT.reshape(-1, 1)
        self._seen.clear()
        self._input_sums.clear()
        self._gradient_sums.clear()
        self.tokens += shape[0] * shape[1] if mask_BT is None else int(mask_BT.sum())

    def end_batch(self) -> None:
        """Check the batch that was just run: one look at the device for all layers.

        Raises:
            NonFiniteError: naming the first layer (inputs, in forward order) or the last one
                (gradients, in backward order) where a value was not finite, and the window.
        """
        if not self._input_sums:
            return
        self._raise_if_bad(self._input_sums, "input", reverse=False)
        self._raise_if_bad(self._gradient_sums, "output gradient", reverse=True)

    def _raise_if_bad(self, sums: dict[int, Tensor], what: str, *, reverse: bool) -> None:
        order = sorted(sums, reverse=reverse)
        bad = ~torch.isfinite(torch.stack([sums[index] for index in order]))
        if not bool(bad.any()):
            return
        which, offset = (int(i) for i in bad.nonzero()[0])
        layer = self._layers[order[which]].name
        window = self._first_window + offset
        raise NonFiniteError(
            f"{what} of layer {layer} is not finite in calibration window {window}", layer=layer, index=window
        )

    def _forward_hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._consume_input(index, args[0])
            if torch.is_grad_enabled():
                if not output.requires_grad:
                    output.requires_grad_()
                output.register_hook(lambda gradient: self._consume_gradient(index, gradient))  # type: ignore[no-untyped-call]

        return hook

    def _consume_input(self, index: int, inputs: Tensor) -> None:
        known = self._seen.get(id(inputs))
        shared = known is not None and known[0]() is inputs
        leader = known[1] if shared and known is not None else index
        if self._leader.setdefault(index, leader) != leader:
            raise SurgeonError(f"layer {self._layers[index].name} does not read the same tensor in every pass")
        if shared:
            return
        self._seen[id(inputs)] = (weakref.ref(inputs), index)
        if self._probing:
            return
        with torch.no_grad():
            X_NC = self._flat(inputs)
            add_second_moment_(self._A[index], X_NC)
            self._a[index] += X_NC.sum(0)
            self._input_sums[index] = X_NC.reshape(self._batch, -1).sum(1)

    def _consume_gradient(self, index: int, gradient: Tensor) -> None:
        with torch.no_grad():
            X_NR = self._flat(gradient)
            add_second_moment_(self._G[index], X_NR)
            self._gradient_sums[index] = X_NR.reshape(self._batch, -1).sum(1)

    def _flat(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).to(self._dtype)
        # Not a product with the mask: NaN at a padded place must not reach the sums.
        return flat if self._mask is None else torch.where(self._mask, flat, 0.0)

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

    def gradient_moment(self, index: int) -> Tensor:
        """``G_RR`` of a layer, mean over the tokens. Call it once a layer."""
        return mirror_upper_(self._G[index]).div_(self.tokens)

    def _unreached(self, index: int) -> ZeroCurvatureError:
        name = self._layers[index].name
        return ZeroCurvatureError(f"layer {name} was never reached by the calibration data", layer=name)
