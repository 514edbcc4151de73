"""Labels drawn from the model's own predictions, for the Monte-Carlo Fisher."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from surgeon.evaluation import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

# Float64 probabilities of so many (position, token) pairs are held at a time: 128 MB.
_CHUNK = 1 << 24


@torch.no_grad()
def draw_labels(log_p_BTV: Tensor, labels_BT: Tensor, *, seed: int, first_window: int, samples: int) -> Tensor:
    """Draw a next token for every predicted position from the model's softmax.

    By inversion: the first token whose cumulative probability (float64) exceeds a uniform number.
    The uniforms come from a generator on the CPU that is seeded by (seed, window, sample) alone, one
    a position: draws do not depend on the batch a window is in, on its padding or on the device
    beyond the rounding of the probabilities themselves. A token of probability zero is never drawn.

    Args:
        log_p_BTV: log-probabilities.
        labels_BT: the data's own labels; ``-100`` where nothing is predicted.
        seed: of the run.
        first_window: index of the batch's first window.
        samples: S.

    Returns:
        ``[S, B, T]`` int64, ``-100`` where ``labels_BT`` is.
    """
    B, T, V = log_p_BTV.shape
    drawn_SBT = labels_BT.expand(samples, B, T).clone()
    step = max(1, _CHUNK // V)
    for window in range(B):
        uniforms_TS = torch.stack([_uniforms(seed, first_window + window, s, T) for s in range(samples)], 1)
        uniforms_TS = uniforms_TS.to(log_p_BTV.device)
        for start in range(0, T, step):
            places = slice(start, start + step)
            cumulative = log_p_BTV[window, places].to(torch.float64).exp().cumsum(-1)
            thresholds = uniforms_TS[places] * cumulative[:, -1:]  # rounding: the last need not be 1
            tokens = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=V - 1)
            drawn_SBT[:, window, places] = tokens.T
    return drawn_SBT.masked_fill_(labels_BT == IGNORED, IGNORED)


def _uniforms(seed: int, window: int, sample: int, count: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{window}:{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.rand(count, generator=generator, dtype=torch.float64)
