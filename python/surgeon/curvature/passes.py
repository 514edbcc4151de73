"""One pass over the calibration windows: forward, backward, checks, loss. Every kind of curvature runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from surgeon.curvature.sampling import draw_labels
from surgeon.errors import ConfigError, NonFiniteError
from surgeon.evaluation import IGNORED, next_token_loss_sum, shifted_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.curvature.base import CurvatureOptions
    from surgeon.curvature.hooks import Collector
    from surgeon.data import Batch, Windows


def run_pass(
    model: PreTrainedModel,
    windows: Windows,
    collector: Collector,
    *,
    batch_tokens: int,
    advance: Callable[[int], None],
    options: CurvatureOptions,
) -> float:
    """Run all windows through the model while the collector watches.

    What is differentiated is the *sum* of the losses of a batch, so a window's gradients do not
    depend on what else is in its batch. Labels are the data's next tokens, or draws from the model's
    predictions: then one backward pass a draw follows the one forward pass.

    Args:
        model: weights frozen, eval mode.
        windows: calibration windows.
        collector: entered; it says whether gradients are wanted.
        batch_tokens: tokens a batch.
        advance: called with the number of windows just done.
        options: which Fisher, and how many draws.

    Returns:
        The mean next-token loss on the data's own tokens, in nats.

    Raises:
        NonFiniteError: naming the layer and the window.
    """
    device = model.device
    sampled = collector.gradients and options.sampled
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    predicted = 0
    for batch in windows.batches(batch_tokens):
        ids_BT = batch.ids.to(device)
        mask_BT = None if batch.mask is None else batch.mask.to(device)
        collector.begin_batch(
            (ids_BT.shape[0], ids_BT.shape[1]),
            first_window=batch.first,
            mask_BT=mask_BT,
            samples=options.fisher_samples if sampled else 1,
        )
        with torch.set_grad_enabled(collector.gradients):
            logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
            loss, count = next_token_loss_sum(logits.detach() if sampled else logits, ids_BT, mask_BT)
            if sampled:
                log_p_BTV = functional.log_softmax(logits, -1)
                del logits
                _backward_on_draws(log_p_BTV, shifted_labels(ids_BT, mask_BT), options, batch.first)
                del log_p_BTV
            else:
                del logits
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
        collector.end_batch()
        _raise_if_not_finite(loss, batch)
        loss_sum += loss.detach()
        predicted += count
        advance(ids_BT.shape[0])
    return float(loss_sum) / max(predicted, 1)


def require_windows(windows: Windows | None, kind: str) -> Windows:
    """The windows.

    Raises:
        ConfigError: there are none, and this kind of curvature cannot do without.
    """
    if windows is None:
        raise ConfigError(f"{kind} curvature needs calibration windows")
    return windows


class Spread:
    """Tells an observer of several passes over the windows as if they were one.

    Args:
        advance: the observer, called with counts that add up to ``windows``.
        windows: how many windows a pass has.
        passes: how many passes there are.
    """

    def __init__(self, advance: Callable[[int], None], *, windows: int, passes: int) -> None:
        self._advance = advance
        self._windows = windows
        self._passes = passes
        self._done = 0
        self._told = 0

    def __call__(self, count: int) -> None:
        """So many windows of the present pass are done."""
        self._done += count
        self._tell(self._done // self._passes)

    def finish(self) -> None:
        """No further pass is needed."""
        self._tell(self._windows)

    def _tell(self, reached: int) -> None:
        if reached > self._told:
            self._advance(reached - self._told)
            self._told = reached


def _backward_on_draws(log_p_BTV: Tensor, labels_BT: Tensor, options: CurvatureOptions, first_window: int) -> None:
    draws_SBT = draw_labels(
        log_p_BTV.detach(), labels_BT, seed=options.seed, first_window=first_window, samples=options.fisher_samples
    )
    flat = log_p_BTV.reshape(-1, log_p_BTV.shape[-1])
    if not flat.requires_grad:
        return
    for sample, drawn_BT in enumerate(draws_SBT):
        loss = functional.nll_loss(flat, drawn_BT.reshape(-1), ignore_index=IGNORED, reduction="sum")
        loss.backward(retain_graph=sample + 1 < len(draws_SBT))  # type: ignore[no-untyped-call]


def _raise_if_not_finite(loss: Tensor, batch: Batch) -> None:
    if not torch.isfinite(loss):
        raise NonFiniteError(
            f"the loss is not finite in calibration windows {batch.first} to {batch.first + len(batch.ids) - 1}",
            index=batch.first,
        )
