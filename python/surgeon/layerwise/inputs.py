"""Second moments of the inputs of one block's layers, as the block runs."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Self

import torch

from surgeon.errors import NonFiniteError, SurgeonError, ZeroCurvatureError
from surgeon.linalg import add_second_moment_, mirror_upper_

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from surgeon.layers import PrunableLayer


class InputMoments:
    """Accumulates A (of the weight alone, no bias) of some layers, as a context manager.

    Layers that read the very same tensor (q, k, v; gate, up) share one A, found by identity.

    Args:
        layers: by layer index.
        dtype: of the accumulators.
    """

    def __init__(self, layers: Mapping[int, PrunableLayer], *, dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._sums: dict[int, Tensor] = {}  # by leader: sum of a aᵀ, upper blocks
        self._means: dict[int, Tensor] = {}  # by leader, once finished
        self._leader: dict[int, int] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._checks: dict[int, Tensor] = {}  # by leader: sum of each window's inputs
        self._mask: Tensor | None = None
        self._batch = 1
        self._first_window = 0
        self._tokens = 0

    def __enter__(self) -> Self:
        """Register the hooks."""
        for index, layer in self._layers.items():
            self._handles.append(layer.module.register_forward_pre_hook(self._hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks, whatever happened."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def begin_batch(self, shape: tuple[int, int], *, first_window: int, mask_BT: Tensor | None) -> None:
        """Announce the next pass.

        Args:
            shape: (B, T), windows and tokens a window.
            first_window: index of its first window, for messages.
            mask_BT: True for real tokens, False for padding; None if nothing is padded.
        """
        self._batch = shape[0]
        self._first_window = first_window
        self._mask = None if mask_BT is None else mask_BT.reshape(-1, 1)
        self._seen.clear()
        self._checks.clear()
        self._tokens += shape[0] * shape[1] if mask_BT is None else int(mask_BT.sum())

    def end_batch(self) -> None:
        """Check the batch that was just run: one look at the device for all layers.

        Raises:
            NonFiniteError: naming the first layer whose input was not finite, and the window.
        """
        if not self._checks:
            return
        order = sorted(self._checks)
        bad = ~torch.isfinite(torch.stack([self._checks[index] for index in order]))
        if not bool(bad.any()):
            return
        which, offset = (int(i) for i in bad.nonzero()[0])
        layer = self._layers[order[which]].name
        window = self._first_window + offset
        raise NonFiniteError(
            f"input of layer {layer} is not finite in calibration window {window}", layer=layer, index=window
        )

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._consume(index, args[0])

        return hook

    def _consume(self, index: int, inputs: Tensor) -> None:
        known = self._seen.get(id(inputs))
        shared = known is not None and known[0]() is inputs
        leader = known[1] if shared and known is not None else index
        if self._leader.setdefault(index, leader) != leader:
            raise SurgeonError(f"layer {self._layers[index].name} does not read the same tensor in every pass")
        if shared:
            return
        self._seen[id(inputs)] = (weakref.ref(inputs), index)
        X_NC = inputs.detach().reshape(-1, inputs.shape[-1]).to(self._dtype)
        if self._mask is not None:  # no product with the mask: NaN at a padded place must not reach the sums
            X_NC = torch.where(self._mask, X_NC, 0.0)
        if index not in self._sums:
            self._sums[index] = X_NC.new_zeros(X_NC.shape[1], X_NC.shape[1])
        add_second_moment_(self._sums[index], X_NC)
        self._checks[index] = X_NC.reshape(self._batch, -1).sum(1)

    def moment(self, index: int) -> Tensor:
        """``A_CC`` of a layer, mean over the tokens; the very same tensor for layers that share it.

        Raises:
            ZeroCurvatureError: the layer was never reached.
            NonFiniteError: the sum overflowed.
        """
        name = self._layers[index].name
        if index not in self._leader:
            raise ZeroCurvatureError(f"layer {name} was never reached by the calibration data", layer=name)
        leader = self._leader[index]
        if leader not in self._means:
            A_CC = mirror_upper_(self._sums.pop(leader)).div_(self._tokens)
            if not torch.isfinite(A_CC).all():
                raise NonFiniteError(f"second moment of the input of layer {name} is not finite", layer=name)
            self._means[leader] = A_CC
        return self._means[leader]
