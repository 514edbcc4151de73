"""Activation curvature: second moments of the inputs, by forward passes only.

With G the identity this is the curvature of layer-wise least squares: of Optimal Brain Compression
(Frantar & Alistarh 2022) and SparseGPT (Frantar & Alistarh 2023).
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


def activations(
    model: PreTrainedModel,
    layers: tuple[PrunableLayer, ...],
    windows: Windows | None,
    *,
    batch_tokens: int,
    accumulate: torch.dtype,
    advance: Callable[[int], None],
    options: CurvatureOptions = DEFAULT_OPTIONS,  # noqa: ARG001
) -> CurvatureFactors:
    """A as in K-FAC, ``G = I`` (None); the loss is measured along the way.

    Args:
        model: weights frozen, eval mode.
        layers: the layers to watch.
        windows: calibration windows.
        batch_tokens: tokens a batch.
        accumulate: dtype of the moments.
        advance: called with the number of windows just done.
        options: none concerns this kind.

    Raises:
        NonFiniteError: naming the layer and the window.
        ZeroCurvatureError: a layer was never reached, or every factor is zero.
    """
    return moment_factors(
        model,
        layers,
        require_windows(windows, "activation"),
        gradients=False,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        advance=advance,
    )


register("activations", activations)
