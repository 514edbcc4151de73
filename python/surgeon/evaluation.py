"""Next-token loss and perplexity.

Protocol: mean over the windows of each window's mean next-token loss, exponentiated; windows side
by side from the start of the text. Numbers are comparable at equal text, tokenizer and length only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from surgeon.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.data import Windows

IGNORED = -100


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
        loss: mean of the windows' mean next-token losses, nats a token.
        windows: how many windows.
        tokens: how many predicted tokens.
    """

    loss: float
    windows: int
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def shifted_labels(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Next tokens, ``[B, T]``; ``-100`` in the last place and where a token is padding."""
    labels = torch.full_like(ids_BT, IGNORED)
    labels[:, :-1] = ids_BT[:, 1:]
    if mask_BT is not None:
        labels[:, :-1].masked_fill_(~(mask_BT[:, 1:] & mask_BT[:, :-1]), IGNORED)
    return labels


def next_token_loss_sum(logits_BTV: Tensor, ids_BT: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, int]:
    """Sum of the next-token losses of a batch, and how many tokens were predicted.

    Labels are shifted, not logits: no copy of the largest tensor of the pass.
    """
    labels = shifted_labels(ids_BT, mask_BT)
    flat = logits_BTV.reshape(-1, logits_BTV.shape[-1])
    loss = functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")
    count = ids_BT.shape[0] * (ids_BT.shape[1] - 1) if mask_BT is None else int((labels != IGNORED).sum())
    return loss, count


@torch.no_grad()
def evaluate_windows(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda _count: None,
) -> Evaluation:
    """Perplexity of a model over windows.

    Raises:
        NonFiniteError: a window's loss is not finite; ``index`` is the window.
    """
    device = model.device
    total, predicted = 0.0, 0
    for batch in windows.batches(batch_tokens):
        ids_BT = batch.ids.to(device)
        mask_BT = None if batch.mask is None else batch.mask.to(device)
        logits = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        labels = shifted_labels(ids_BT, mask_BT)
        flat = logits.reshape(-1, logits.shape[-1])  # classes last: several times faster than classes second
        losses = functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="none")
        counts = (labels != IGNORED).sum(1)
        means = losses.reshape(labels.shape).sum(1, dtype=torch.float64) / counts.clamp(min=1)
        if not torch.isfinite(means).all():
            window = batch.first + int((~torch.isfinite(means)).nonzero()[0])
            raise NonFiniteError(f"the loss of window {window} is not finite", index=window)
        total += float(means.sum())
        predicted += int(counts.sum())
        advance(ids_BT.shape[0])
    return Evaluation(total / len(windows), len(windows), predicted)
