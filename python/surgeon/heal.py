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
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from surgeon.adapters import MISSING, Adapter, adapters_on, effective_weight, find_kept
from surgeon.data import Windows
from surgeon.errors import ConfigError, NonFiniteError
from surgeon.evaluation import IGNORED, evaluate_windows, next_token_loss_sum, shifted_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.layers import PrunableLayer

_HELD_OUT = 8  # one window in so many


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
        raise ConfigError(MISSING)


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
    keep = [find_kept(layer, None if keeps is None else keeps(index)) for index, layer in enumerate(layers)]
    with adapters_on(model, layers, keep, rank=settings.rank, seed=settings.seed) as fits:
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


def _fit(
    model: PreTrainedModel,
    fits: list[Adapter],
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
def _merge(fits: list[Adapter]) -> None:
    """Write every layer's new weight, or none."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for fit in fits:
            layer = fit.layer
            # On the host: the device may not hold the model twice.
            saved += [(live, live.to("cpu", copy=True)) for live in (layer.weight, layer.bias) if live is not None]
            W_RC = layer.read(fit.A.dtype)
            W_RC[:, : layer.inputs] = effective_weight(layer.weight, fit.keep.mask, fit.A, fit.B)
            layer.write(W_RC)
    except BaseException:
        for live, old in saved:
            live.copy_(old)
        raise
