"""First-order correction: a short low-rank fit that takes back part of what pruning cost.

After LLM Surgeon, "first-order correction": between shots, and for longer after the last, low-rank
adapters (LoRA, Hu et al. 2021; made by ``peft``) are fitted to the next-token loss and merged into the
weights with the masks kept.

What is fitted is what is merged. With ``W [R, C]``, the mask ``M`` of the weights that stay, and adapters
``B [R, r]`` and ``A [r, C]``, the model runs with ``W + M∘(B·A)`` while it is fitted, and that is the weight
it is left with. Where M is a row mask times a column mask, all this takes is zero rows of B and zero
columns of A, and the product never becomes a matrix. Any other mask needs the full weight and its
gradient in every pass: half as much work again.

One step is one window unless told otherwise: calibration sets are small, Adam's step does not grow with
the batch, and so it is the number of steps that decides how far a fit gets. ``batch_tokens`` only says
how many of a step's windows run at once.

An eighth of the windows, and no more than the fit visits, is held out. If the fit does not lower their
loss, the weights stay as they were and the record says so.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgeon.data import Windows
from surgeon.errors import ConfigError, NonFiniteError, SurgeonError
from surgeon.evaluation import IGNORED, evaluate_windows, next_token_loss_sum, shifted_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.layers import PrunableLayer

_ADAPTER = "surgeon"
_HELD_OUT = 8  # one window in so many
_MISSING = "healing needs peft: pip install 'llm-surgeon[heal]'"


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """Settings of one fit.

    Attributes:
        rank: r, of every adapter.
        learning_rate: of Adam at the first step, falling to zero in a straight line. The paper's 1e-4 is
            for many more steps than small calibration sets have.
        epochs: passes over the windows that are not held out; a fraction takes so much of them.
        step_windows: windows a step.
        seed: draws the adapters, the held out windows and the order. Give every fit of a run its own,
            or short ones all visit the same few windows.
    """

    rank: int = 8
    learning_rate: float = 1e-3
    epochs: float = 1.0
    step_windows: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("step_windows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name.replace('_', '-')} is {value}: it must be at least {least}")
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ConfigError(f"{name.replace('_', '-')} is {value}: it must be a positive number")


@dataclass(frozen=True)
class HealRecord:
    """What one fit did.

    Attributes:
        loss_before: mean next-token loss of the held out windows before the fit, nats.
        loss_after: the same after it, whether it was kept or not.
        kept: whether the fit lowered that loss; if not, the weights are as they were.
        steps: optimiser steps.
        windows: windows visited, each visit counted.
        held_out: windows of the two losses.
    """

    loss_before: float
    loss_after: float
    kept: bool
    steps: int
    windows: int
    held_out: int


def require_peft() -> None:
    """Check that ``peft`` is there, without the seconds that importing it takes.

    Raises:
        ConfigError: it is not; the line says how to install it.
    """
    if find_spec("peft") is None:
        raise ConfigError(_MISSING)


def planned_windows(count: int, settings: HealSettings) -> int:
    """How many windows :func:`heal` tells ``advance`` of in all, if it is given ``count`` windows."""
    held, visits = _plan(count, settings)
    return 2 * len(held) + len(visits)


def heal(
    model: PreTrainedModel,
    layers: tuple[PrunableLayer, ...],
    windows: Windows,
    *,
    settings: HealSettings,
    batch_tokens: int,
    keeps: Callable[[int], Tensor] | None = None,
    advance: Callable[[int], None] = lambda _count: None,
) -> HealRecord:
    """Fit low-rank adapters on the given layers, merge them, and leave the model built as it was.

    Biases and all other weights stay as they are; all-zero rows and columns stay zero. Deterministic for
    a seed on one machine. Memory is that of a pass with activation gradients, plus the adapters and
    Adam's moments; while the weights are written, a copy of them, so that nothing is left half merged.

    Args:
        model: the live model; afterwards in eval mode with its weights frozen.
        layers: what is fitted.
        windows: calibration windows.
        settings: of the fit.
        batch_tokens: tokens a pass; changes speed and memory, never the result beyond rounding.
        keeps: ``index → [R, C]`` bool, which weights of a layer stay (the bias column is ignored); None
            means those that are not zero. Give it where rows and columns were removed: a weight that is
            zero by accident otherwise costs its layer the cheap path.
        advance: told after every so many windows; see :func:`planned_windows`.

    Raises:
        ConfigError: ``peft`` is not installed.
        NonFiniteError: a loss, an adapter or a new weight is not finite; the weights are as they were.
    """
    require_peft()
    held, visits = _plan(len(windows), settings)
    model.eval()  # type: ignore[no-untyped-call]
    before = _held_out_loss(model, windows, held, batch_tokens, advance)
    keep = [_kept(layer, None if keeps is None else keeps(index)) for index, layer in enumerate(layers)]
    with _adapters(model, layers, keep, settings) as fits:
        steps = _fit(model, fits, windows, visits, settings=settings, batch_tokens=batch_tokens, advance=advance)
        after = _held_out_loss(model, windows, held, batch_tokens, advance)
    kept = after < before
    if kept:
        _merge(fits)
    return HealRecord(before, after, kept, steps, len(visits), len(held))


def _plan(count: int, settings: HealSettings) -> tuple[Tensor, Tensor]:
    """Indices of the windows held out, and of those visited, in order. A single window is both."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(count, generator=generator)
    held = max(1, min(count // _HELD_OUT, round(settings.epochs * count)))
    rest = order[held:] if count > held else order
    total = max(1, round(settings.epochs * len(rest)))
    passes = [rest]
    while len(passes) * len(rest) < total:
        passes.append(rest[torch.randperm(len(rest), generator=generator)])
    return order[:held], torch.cat(passes)[:total]


@dataclass(frozen=True)
class _Kept:
    """Which weights may change: rows and columns with any, and the mask if it is not their product."""

    rows: Tensor
    columns: Tensor
    other: Tensor | None

    @property
    def mask(self) -> Tensor:
        return self.rows[:, None] & self.columns if self.other is None else self.other


def _kept(layer: PrunableLayer, keep: Tensor | None) -> _Kept:
    mask = layer.weight != 0
    if keep is not None:
        mask = keep[:, : layer.inputs].to(mask.device, torch.bool) & mask.any(1)[:, None] & mask.any(0)
    rows, columns = mask.any(1), mask.any(0)
    product = int(mask.sum()) == int(rows.sum()) * int(columns.sum())
    return _Kept(rows, columns, None if product else mask)


@dataclass(frozen=True)
class _Fit:
    """The adapter of one layer: ``A [r, inputs]`` and ``B [R, r]``."""

    layer: PrunableLayer
    keep: _Kept
    A: nn.Parameter
    B: nn.Parameter


def _effective(weight: Tensor, mask: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``W + M∘(B·A)``, ``[R, inputs]`` in the adapter's dtype."""
    return weight + torch.where(mask, B @ A, 0.0)


class _MaskedProduct(torch.autograd.Function):
    """``X (W + M∘(B·A))ᵀ``, its weight made again on the way back: kept, it would be a second model."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(X, *parts)
        return X @ _effective(*parts).to(X.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        X, weight, mask, A, B = ctx.saved_tensors
        (gradient,) = gradients
        to_X = None
        if ctx.needs_input_grad[0]:
            to_X = gradient @ _effective(weight, mask, A, B).to(gradient.dtype)
        to_W = gradient.reshape(-1, gradient.shape[-1]).T @ X.reshape(-1, X.shape[-1])
        to_BA = torch.where(mask, to_W.to(A.dtype), 0.0)
        return to_X, None, None, B.T @ to_BA, to_BA @ A.T


class _MaskedLinear(nn.Module):
    """Stands in for a layer whose mask is no product of a row mask and a column mask."""

    def __init__(self, fit: _Fit) -> None:
        super().__init__()
        self._fit = fit

    def forward(self, X: Tensor) -> Tensor:
        fit = self._fit
        out: Tensor = _MaskedProduct.apply(X, fit.layer.weight, fit.keep.mask, fit.A, fit.B)
        return out if fit.layer.bias is None else out + fit.layer.bias


@contextmanager
def _adapters(
    model: PreTrainedModel, layers: tuple[PrunableLayer, ...], keep: list[_Kept], settings: HealSettings
) -> Iterator[list[_Fit]]:
    """An adapter on every layer; afterwards, whatever happened, not a trace of them in the model."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:  # there, but not one that fits what is around it
        raise ConfigError(f"{_MISSING} ({error})") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,  # their quotient scales the product
        target_modules="|".join(re.escape(layer.name) for layer in layers),
        fan_in_fan_out=layers[0].transposed,
    )
    known = set(vars(model))
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; what counts is drawn below
            inject_adapter_in_model(config, model, _ADAPTER)
        model.requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(settings.seed)
        yield [_attach(model, layer, kept, generator) for layer, kept in zip(layers, keep, strict=True)]
    finally:
        for layer in layers:
            _put(model, layer.name, layer.module)
        for name in set(vars(model)) - known:
            delattr(model, name)
        model.requires_grad_(requires_grad=False)


def _attach(model: PreTrainedModel, layer: PrunableLayer, keep: _Kept, generator: torch.Generator) -> _Fit:
    """Draw a layer's adapter, bind it to the mask and let it be fitted."""
    wrapper: Any = model.get_submodule(layer.name)
    if getattr(wrapper, "base_layer", None) is not layer.module:
        raise SurgeonError(f"peft put no adapter on layer {layer.name}")
    # Steps of the learning rate's size are lost in half precision.
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    fit = _Fit(layer, keep, wrapper.lora_A[_ADAPTER].to(dtype).weight, wrapper.lora_B[_ADAPTER].to(dtype).weight)
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
    if keep.other is not None:
        _put(model, layer.name, _MaskedLinear(fit))
    return fit


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _fit(
    model: PreTrainedModel,
    fits: list[_Fit],
    windows: Windows,
    visits: Tensor,
    *,
    settings: HealSettings,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> int:
    """Adam over the visits; returns how many steps it took."""
    optimiser = torch.optim.Adam([adapter for fit in fits for adapter in (fit.A, fit.B)], lr=settings.learning_rate)
    size = settings.step_windows
    steps = math.ceil(len(visits) / size)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * (1.0 - step / steps)
        chosen = visits[step * size : (step + 1) * size]
        part = _take(windows, chosen)
        predicted = max(1, int((shifted_labels(part.ids, part.mask) != IGNORED).sum()))
        for batch in part.batches(batch_tokens):
            ids_BT = batch.ids.to(model.device)
            mask_BT = None if batch.mask is None else batch.mask.to(model.device)
            with torch.enable_grad():
                logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
                loss = next_token_loss_sum(logits, ids_BT, mask_BT)[0] / predicted
                if not math.isfinite(loss.item()):
                    window = int(chosen[batch.first])
                    message = f"the loss of step {step + 1} of healing is not finite, at calibration window {window}"
                    raise NonFiniteError(message, index=window)
                loss.backward()  # type: ignore[no-untyped-call]
            advance(ids_BT.shape[0])
        optimiser.step()
        optimiser.zero_grad()
    for fit in fits:
        if not bool(torch.isfinite(fit.A).all() & torch.isfinite(fit.B).all()):
            name = fit.layer.name
            raise NonFiniteError(f"the adapter of layer {name} is not finite after step {steps}", layer=name)
    return steps


def _held_out_loss(
    model: PreTrainedModel, windows: Windows, held: Tensor, batch_tokens: int, advance: Callable[[int], None]
) -> float:
    try:
        return evaluate_windows(model, _take(windows, held), batch_tokens=batch_tokens, advance=advance).loss
    except NonFiniteError as error:
        window = int(held[error.index or 0])
        raise NonFiniteError(f"the loss of calibration window {window} is not finite", index=window) from error


def _take(windows: Windows, chosen: Tensor) -> Windows:
    mask = None if windows.mask is None else windows.mask[chosen]
    return Windows(windows.ids[chosen], windows.source, mask)


@torch.no_grad()
def _merge(fits: list[_Fit]) -> None:
    """Write every layer's new weight, or none."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for fit in fits:
            layer = fit.layer
            saved += [(live, live.clone()) for live in (layer.weight, layer.bias) if live is not None]
            W_RC = layer.read(fit.A.dtype)
            W_RC[:, : layer.inputs] = _effective(layer.weight, fit.keep.mask, fit.A, fit.B)
            layer.write(W_RC)
    except BaseException:
        for live, old in saved:
            live.copy_(old)
        raise
