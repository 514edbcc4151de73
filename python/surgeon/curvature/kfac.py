"""K-FAC: independence of activations and derivatives (IAD), empirical or Monte-Carlo Fisher.

LLM Surgeon, section 3.1; Martens & Grosse 2015; "expand" weight sharing of Eschenhagen et al. 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.curvature.base import DEFAULT_OPTIONS, register
from surgeon.curvature.moments import moment_factors
from surgeon.curvature.passes import require_windows

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from surgeon.curvature.base import CurvatureFactors, CurvatureOptions
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
    options: CurvatureOptions = DEFAULT_OPTIONS,
) -> CurvatureFactors:
    """A and G of every layer over all windows: one forward and one activation-only backward pass.

    The loss is the *sum* of the next-token losses of a batch, so a window's gradients do not depend
    on what else is in its batch. With the Monte-Carlo Fisher a backward pass a draw follows the one
    forward pass, and G is the mean over the draws of ``g gᵀ``.

    Args:
        model: weights frozen, eval mode.
        layers: the layers to watch.
        windows: calibration windows.
        batch_tokens: tokens a batch.
        accumulate: dtype of the moments.
        advance: called with the number of windows just done.
        options: which Fisher, and how many draws.

    Raises:
        NonFiniteError: naming the layer and the window.
        ZeroCurvatureError: a layer was never reached, or every factor is zero.
    """
    return moment_factors(
        model,
        layers,
        require_windows(windows, "K-FAC"),
        gradients=True,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        advance=advance,
        options=options,
    )


register("kfac", kfac)
