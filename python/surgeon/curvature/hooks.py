"""Hooks that hand a layer's inputs and output gradients to whoever sums something up over them.

The life cycle of the hooks, the padding and the finite checks live here, apart from the
mathematics: a kind of curvature is a child of :class:`Collector`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Self

import torch

from surgeon.errors import NonFiniteError, SurgeonError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from surgeon.layers import PrunableLayer


class Collector:
    """Watches layers while the model runs, as a context manager; children say what is summed.

    * Weights need no gradient: a layer's output that does not require one yet is made to, so the
      backward pass computes activation gradients only, and none below the first layer.
    * Layers that read the very same tensor (q, k, v; gate, up) are found by identity: the first of
      them is their leader.
    * Several backward passes may follow one forward pass, each hands over its gradients.

    Args:
        layers: the layers to watch.
        dtype: of everything that is summed.
        gradients: whether backward passes are wanted at all.

    Attributes:
        gradients: as given.
        tokens: N, tokens seen so far, padding left out.
        samples: backward passes a batch.
    """

    def __init__(self, layers: tuple[PrunableLayer, ...], *, dtype: torch.dtype, gradients: bool = True) -> None:
        self._layers = layers
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._leader: dict[int, int] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._mask: Tensor | None = None
        self._batch = 1
        self._first_window = 0
        self._input_sums: dict[int, Tensor] = {}
        self._gradient_sums: dict[int, Tensor] = {}
        self.gradients = gradients
        self.tokens = 0
        self.samples = 1

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
        self._forget()

    def begin_batch(
        self, shape: tuple[int, int], *, first_window: int, mask_BT: Tensor | None = None, samples: int = 1
    ) -> None:
        """Announce the next forward pass.

        Args:
            shape: (B, T), windows and tokens a window.
            first_window: index of its first window, for messages.
            mask_BT: True for real tokens, False for padding; None if nothing is padded.
            samples: how many backward passes follow; the same for every batch.
        """
        self._batch = shape[0]
        self._first_window = first_window
        self._mask = None if mask_BT is None else mask_BT.reshape(-1, 1)
        self._forget()
        self.tokens += shape[0] * shape[1] if mask_BT is None else int(mask_BT.sum())
        self.samples = samples

    def end_batch(self) -> None:
        """Check the batch that was just run: one look at the device for all layers.

        Raises:
            NonFiniteError: naming the first layer (inputs, in forward order) or the last one
                (gradients, in backward order) where a value was not finite, and the window.
        """
        self._raise_if_bad(self._input_sums, "input", reverse=False)
        self._raise_if_bad(self._gradient_sums, "output gradient", reverse=True)

    def _raise_if_bad(self, sums: dict[int, Tensor], what: str, *, reverse: bool) -> None:
        if not sums:
            return
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

    def _forget(self) -> None:
        """Let go of everything that belongs to one batch."""
        self._seen.clear()
        self._input_sums.clear()
        self._gradient_sums.clear()

    def _forward_hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._see_input(index, args[0])
            if torch.is_grad_enabled():
                if not output.requires_grad:
                    output.requires_grad_()
                output.register_hook(lambda gradient: self._see_gradient(index, gradient))  # type: ignore[no-untyped-call]

        return hook

    def _see_input(self, index: int, inputs: Tensor) -> None:
        known = self._seen.get(id(inputs))
        shared = known is not None and known[0]() is inputs
        leader = known[1] if shared and known is not None else index
        if self._leader.setdefault(index, leader) != leader:
            raise SurgeonError(f"layer {self._layers[index].name} does not read the same tensor in every pass")
        if not shared:
            self._seen[id(inputs)] = (weakref.ref(inputs), index)
        with torch.no_grad():
            self._take_input(index, inputs, shared=shared)

    def _see_gradient(self, index: int, gradient: Tensor) -> None:
        with torch.no_grad():
            X_NR = self._flat(gradient)
            self._take_gradient(index, X_NR)
            sums = X_NR.reshape(self._batch, -1).sum(1)
            before = self._gradient_sums.get(index)
            self._gradient_sums[index] = sums if before is None else before + sums

    def _take_input(self, index: int, inputs: Tensor, *, shared: bool) -> None:
        """A layer's inputs ``[..., in_features]``; ``shared`` if another layer's are the same tensor."""
        raise NotImplementedError

    def _take_gradient(self, index: int, X_NR: Tensor) -> None:
        """A layer's output gradients, zero where padded."""
        raise NotImplementedError

    def _check_input(self, index: int, X_NC: Tensor) -> None:
        """Have :meth:`end_batch` look at these inputs."""
        self._input_sums[index] = X_NC.reshape(self._batch, -1).sum(1)

    def _flat(self, tensor: Tensor) -> Tensor:
        """One row a token, in the accumulator's dtype, zero where padded."""
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).to(self._dtype)
        # Not a product with the mask: NaN at a padded place must not reach the sums.
        return flat if self._mask is None else torch.where(self._mask, flat, 0.0)
