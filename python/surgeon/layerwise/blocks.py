"""One decoder block after the other, each on what the pruned blocks before it give.

How a family calls its blocks (masks, positions, rotary embeddings, whatever comes next) is not
written down here: a real forward pass is watched once for each shape of a batch and its arguments
are used again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import ModelError
from surgeon.layerwise.inputs import InputMoments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from surgeon.data import Batch, Windows
    from surgeon.layers import PrunableLayer

# The keyword under which a block gets its hidden states where they do not come first.
_HIDDEN = "hidden_states"


class _StopForwardError(Exception):
    """Ends a forward pass once there is nothing more to see in it."""


@dataclass(frozen=True)
class _Call:
    """What a block was called with, its hidden states taken out.

    Attributes:
        args: positional arguments behind the hidden states.
        kwargs: keyword arguments.
        keyword: whether the hidden states came by keyword.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool

    def run(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """The block's hidden states for others at its entrance."""
        if self.keyword:
            return _hidden(block(*self.args, **{_HIDDEN: hidden_BTD}, **self.kwargs))
        return _hidden(block(hidden_BTD, *self.args, **self.kwargs))


@dataclass
class _Pass:
    """One batch on its way through the blocks.

    Attributes:
        hidden: ``[B, T, D]``, input of the next block.
        calls: how each block is called for this shape and mask.
        mask: ``[B, T]``, False where padded; None if nothing is.
        first: index of its first window.
    """

    hidden: Tensor
    calls: list[_Call]
    mask: Tensor | None
    first: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return int(self.hidden.shape[0]), int(self.hidden.shape[1])


@torch.no_grad()
def prune_blocks(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    layers: tuple[PrunableLayer, ...],
    windows: Windows,
    *,
    batch_tokens: int,
    prune_layer: Callable[[int, Tensor, Tensor], Tensor],
    advance: Callable[[int], None],
    accumulate: torch.dtype,
) -> None:
    """Prune a model's layers block by block, in place.

    For each block: A of its layers over all windows, their inputs being those that the pruned
    blocks before and this still unpruned one give; the new weights of all its layers; and the inputs
    of the next block. Biases stay as they are. Hidden states of all windows lie on the model's device.

    The arguments of the blocks other than the hidden states must be a function of the batch's shape
    and mask alone, as they are in all families that :mod:`surgeon.models` knows.

    Args:
        model: weights frozen, eval mode.
        blocks: its decoder blocks, in the order in which they run.
        layers: the layers to prune; ``layer.block`` is an index into ``blocks``.
        windows: calibration windows.
        batch_tokens: tokens a batch.
        prune_layer: ``(index, W_RC, A_CC) → W_RC`` in ``accumulate``'s dtype, both without the bias;
            called in the layers' order. Layers that read the same tensor get the very same A. It may
            change ``W_RC`` but not ``A_CC``.
        advance: called with the number of windows just done, ``len(blocks) · len(windows)`` in all.
        accumulate: dtype of the moments.

    Raises:
        NonFiniteError: naming the layer, and the window or the weight.
        ZeroCurvatureError: a layer was never reached.
        ModelError: the blocks do not simply run one after the other.
    """
    passes = _begin(model, blocks, windows, batch_tokens)
    for number, block in enumerate(blocks):
        mine = {index: layer for index, layer in enumerate(layers) if layer.block == number}
        with InputMoments(mine, dtype=accumulate) as moments:
            for batch in passes:
                moments.begin_batch(batch.shape, first_window=batch.first, mask_BT=batch.mask)
                if mine:
                    batch.calls[number].run(block, batch.hidden)
                moments.end_batch()
                advance(batch.shape[0])
        for index, layer in mine.items():
            W_RC = layer.read(layer.weight.dtype)
            weight_RC, bias_R1 = W_RC[:, : layer.inputs], W_RC[:, layer.inputs :]
            new_RC = prune_layer(index, weight_RC.to(accumulate), moments.moment(index))
            layer.write(torch.cat([new_RC.to(W_RC.dtype), bias_R1], dim=1))
        if number + 1 < len(blocks):
            for batch in passes:
                batch.hidden = batch.calls[number].run(block, batch.hidden)


def _begin(model: PreTrainedModel, blocks: Sequence[nn.Module], windows: Windows, batch_tokens: int) -> list[_Pass]:
    """All batches at the entrance of the first block."""
    known: dict[tuple[tuple[int, ...], bytes | None], list[_Call]] = {}
    passes = []
    for batch in windows.batches(batch_tokens):
        key = (tuple(batch.ids.shape), None if batch.mask is None else batch.mask.contiguous().numpy().tobytes())
        watcher = _Watcher(blocks if key not in known else blocks[:1])
        mask_BT = None if batch.mask is None else batch.mask.to(model.device)
        watcher.watch(model, batch, mask_BT)
        assert watcher.entrance is not None
        passes.append(_Pass(watcher.entrance, known.setdefault(key, watcher.calls), mask_BT, batch.first))
    return passes


@dataclass
class _Watcher:
    """Records how blocks are called, up to the entrance of the last one.

    Attributes:
        blocks: in order.
        calls: one a block.
        entrance: hidden states that the first one was called with.
    """

    blocks: Sequence[nn.Module]
    calls: list[_Call] = field(default_factory=list)
    entrance: Tensor | None = None
    _previous: Tensor | None = None

    def watch(self, model: PreTrainedModel, batch: Batch, mask_BT: Tensor | None) -> None:
        """Run a batch until the last block is reached.

        Raises:
            ModelError: a block was not reached in its turn, or the model does more between two blocks
                than to hand on the hidden states.
        """
        handles: list[RemovableHandle] = []
        try:
            for number, block in enumerate(self.blocks):
                handles.append(block.register_forward_pre_hook(self._enter(number), with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave))
            model(input_ids=batch.ids.to(model.device), attention_mask=mask_BT, use_cache=False)
        except _StopForwardError:
            return
        finally:
            self._previous = None
            for handle in handles:
                handle.remove()
        raise ModelError(f"decoder block {len(self.calls)} of {type(model).__name__} was never reached")

    def _enter(self, number: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keyword = not args
            if len(self.calls) != number or (keyword and _HIDDEN not in kwargs):
                raise ModelError(
                    f"decoder block {number} ({type(module).__name__}) is not called once, in its turn, "
                    f"with hidden states: this model cannot be pruned block by block"
                )
            hidden = kwargs[_HIDDEN] if keyword else args[0]
            rest = {name: value for name, value in kwargs.items() if not (keyword and name == _HIDDEN)}
            if number == 0:
                self.entrance = hidden
            elif self._previous is not hidden and not (
                self._previous is not None and torch.equal(self._previous, hidden)
            ):
                raise ModelError(
                    f"the model changes the hidden states between decoder blocks {number - 1} and {number}: "
                    f"it cannot be pruned block by block"
                )
            self.calls.append(_Call(args[1:], rest, keyword))
            if number + 1 == len(self.blocks):
                raise _StopForwardError

        return hook

    def _leave(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._previous = _hidden(output)


def _hidden(output: Any) -> Tensor:
    """A block gives its hidden states alone, or first in a tuple."""
    hidden = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(hidden, torch.Tensor)
    return hidden
