"""Low-rank adapters on a model's layers while a fit goes on: made by ``peft``, bound to the masks.

With ``W [R, C]``, the mask ``M`` of the weights that stay, and adapters ``B [R, r]`` and ``A [r, C]``, a layer
runs with ``W + M∘(B·A)``. Where M is a row mask times a column mask this takes zero rows of B and zero columns
of A; any other mask takes the full weight, made anew in every pass.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgeon.errors import ConfigError, SurgeonError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.layers import PrunableLayer

MISSING = "healing needs peft: pip install 'llm-surgeon[heal]'"
_ADAPTER = "surgeon"


@dataclass(frozen=True)
class Kept:
    """Which weights may change: rows and columns with any, and more than that if it is not their product.

    A mask that is in the weights themselves is read off them and not kept: of all layers together it
    would be a quarter of a float32 model.
    """

    layer: PrunableLayer
    rows: Tensor
    columns: Tensor
    product: bool
    given: Tensor | None

    @property
    def mask(self) -> Tensor:
        """Bool ``[R, inputs]``."""
        if self.product:
            return self.rows[:, None] & self.columns
        return self.layer.weight != 0 if self.given is None else self.given


def find_kept(layer: PrunableLayer, keep: Tensor | None) -> Kept:
    """What may change of a layer: what is not zero and, if given, in ``keep [R, C]`` (the bias column is ignored)."""
    mask = layer.weight != 0
    if keep is not None:
        mask = keep[:, : layer.inputs].to(mask.device, torch.bool) & mask.any(1)[:, None] & mask.any(0)
    rows, columns = mask.any(1), mask.any(0)
    product = int(mask.sum()) == int(rows.sum()) * int(columns.sum())
    return Kept(layer, rows, columns, product, None if keep is None or product else mask)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one layer: ``A [r, inputs]`` and ``B [R, r]``."""

    layer: PrunableLayer
    keep: Kept
    A: nn.Parameter
    B: nn.Parameter


def effective_weight(weight: Tensor, mask: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``W + M∘(B·A)``, ``[R, inputs]`` in the adapter's dtype."""
    return weight + torch.where(mask, B @ A, 0.0)


class _MaskedProduct(torch.autograd.Function):
    """``X (W + M∘(B·A))ᵀ``, its weight made again on the way back: kept, it would be a second model."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(X, *parts)
        return X @ effective_weight(*parts).to(X.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        X, weight, mask, A, B = ctx.saved_tensors
        (gradient,) = gradients
        to_X = None
        if ctx.needs_input_grad[0]:
            to_X = gradient @ effective_weight(weight, mask, A, B).to(gradient.dtype)
        to_W = gradient.reshape(-1, gradient.shape[-1]).T @ X.reshape(-1, X.shape[-1])
        to_BA = torch.where(mask, to_W.to(A.dtype), 0.0)
        return to_X, None, None, B.T @ to_BA, to_BA @ A.T


class _MaskedLinear(nn.Module):
    """Stands in for a layer whose mask is no product of a row mask and a column mask."""

    def __init__(self, fit: Adapter) -> None:
        super().__init__()
        self._fit = fit

    def forward(self, X: Tensor) -> Tensor:
        fit = self._fit
        out: Tensor = _MaskedProduct.apply(X, fit.layer.weight, fit.keep.mask, fit.A, fit.B)
        return out if fit.layer.bias is None else out + fit.layer.bias


@contextmanager
def adapters_on(
    model: PreTrainedModel, layers: tuple[PrunableLayer, ...], keep: list[Kept], *, rank: int, seed: int
) -> Iterator[list[Adapter]]:
    """An adapter on every layer; afterwards, whatever happened, not a trace of them in the model."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:  # there, but not one that fits what is around it
        raise ConfigError(f"{MISSING} ({error})") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # their quotient scales the product
        target_modules="|".join(re.escape(layer.name) for layer in layers),
        fan_in_fan_out=layers[0].transposed,
    )
    known = set(vars(model))
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what counts is drawn below
            inject_adapter_in_model(config, model, _ADAPTER)
        model.requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(seed)
        yield [_attach(model, layer, kept, generator) for layer, kept in zip(layers, keep, strict=True)]
    finally:
        for layer in layers:
            _put(model, layer.name, layer.module)
        for name in set(vars(model)) - known:
            delattr(model, name)
        model.requires_grad_(requires_grad=False)


def _attach(model: PreTrainedModel, layer: PrunableLayer, keep: Kept, generator: torch.Generator) -> Adapter:
    """Draw a layer's adapter, bind it to the mask and let it be fitted."""
    wrapper: Any = model.get_submodule(layer.name)
    if getattr(wrapper, "base_layer", None) is not layer.module:
        raise SurgeonError(f"peft put no adapter on layer {layer.name}")
    # Steps of the learning rate's size are lost in half precision.
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    fit = Adapter(layer, keep, wrapper.lora_A[_ADAPTER].to(dtype).weight, wrapper.lora_B[_ADAPTER].to(dtype).weight)
    bound = 1.0 / math.sqrt(layer.inputs)
    drawn = torch.empty(fit.A.shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    rows, columns = keep.rows[:, None].to(dtype), keep.columns.to(dtype)
    with torch.no_grad():
        fit.A.copy_(drawn).mul_(columns)
        fit.B.zero_()
    for adapter, mask in ((fit.A, columns), (fit.B, rows)):
        adapter.requires_grad_()
        # Adam leaves alone what never had a gradient.
        adapter.register_hook(mask.mul)  # type: ignore[no-untyped-call]
    if not keep.product:
        _put(model, layer.name, _MaskedLinear(fit))
    return fit


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
