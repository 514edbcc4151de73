"""K-FAC: independence of activations and derivatives (IAD), empirical Fisher.

LLM Surgeon, section 3.1; Martens & Grosse 2015; "expand" weight sharing of Eschenhagen et al. 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.curvature.base import CurvatureFactors, LayerFactors, register
from surgeon.curvature.hooks import MomentCollector
from surgeon.errors import ConfigError, NonFiniteError, ZeroCurvatureError
from surgeon.evaluation import next_token_loss_sum

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer


def kfac(
    model: PreTrainedModel,
    layers: tuple[PrunableLayer, ...],
    windows: Windows | None,
    *,
    batch_tokens: int,
    accumulate: torch.dtype,
    advance: Callable[[int], None],
) -> CurvatureFactors:
    """A and G of every layer over all windows: one forward and one activation-only backward pass.

    The loss is the *sum* of the next-token losses of a batch, so a window's gradients do not depend
    on what else is in its batch.

    Args:
        model: weights frozen, eval mode.
        layers: the layers to watch.
        windows: calibration windows.
        batch_tokens: tokens a batch.
        accumulate: dtype of the moments.
        advance: called with the number of windows just done.

    Raises:
        NonFiniteError: naming the layer and the window.
        ZeroCurvatureError: a layer was never reached, or every factor is zero.
    """
    if windows is None:
        raise ConfigError("K-FAC curvature needs calibration windows")
    device = model.device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    predicted = 0
    with MomentCollector(layers, dtype=accumulate) as collector:
        collector.probe(model, windows.ids[:1, :2].to(device))
        for batch in windows.batches(batch_tokens):
            ids_BT = batch.ids.to(device)
            mask_BT = None if batch.mask is None else batch.mask.to(device)
            collector.begin_batch((ids_BT.shape[0], ids_BT.shape[1]), first_window=batch.first, mask_BT=mask_BT)
            with torch.enable_grad():
                logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
                loss, count = next_token_loss_sum(logits, ids_BT, mask_BT)
                del logits
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            collector.end_batch()
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss is not finite in calibration windows {batch.first} to {batch.first + len(ids_BT) - 1}",
                    index=batch.first,
                )
            loss_sum += loss.detach()
            predicted += count
            advance(ids_BT.shape[0])
        factors = CurvatureFactors(tokens=collector.tokens, loss=float(loss_sum) / max(predicted, 1))
        for index in range(len(layers)):
            A_CC, leader = collector.input_moment(index)
            factors.layers.append(LayerFactors(A_CC, collector.gradient_moment(index), f"{leader}:{A_CC.shape[0]}"))
    for what, moments in (
        ("inputs", [f.A_CC for f in factors.layers]),
        ("output gradients", [f.G_RR for f in factors.layers]),
    ):
        if not any(moment is not None and bool(moment.diagonal().any()) for moment in moments):
            raise ZeroCurvatureError(f"the {what} of every layer are zero: nothing can be pruned by them")
    return factors


register("kfac", kfac)
