"""Identity curvature: what is left is the magnitude of the weights. Runs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.curvature.base import DEFAULT_OPTIONS, CurvatureFactors, LayerFactors, register

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel

    from surgeon.curvature.base import CurvatureOptions
    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer


def identity(
    model: PreTrainedModel,  # noqa: ARG001
    layers: tuple[PrunableLayer, ...],
    windows: Windows | None,  # noqa: ARG001
    *,
    batch_tokens: int,  # noqa: ARG001
    accumulate: torch.dtype,  # noqa: ARG001
    advance: Callable[[int], None],  # noqa: ARG001
    options: CurvatureOptions = DEFAULT_OPTIONS,  # noqa: ARG001
) -> CurvatureFactors:
    """``A = I``, ``G = I`` for every layer."""
    return CurvatureFactors([LayerFactors(None, None, "identity") for _ in layers])


register("identity", identity)
