"""What curvature is to the rest of the package, and the registry of its kinds.

The Fisher of a layer is approximated by ``G ⊗ A`` (δW row-major), ``A [C, C]`` the second moment of
its inputs and ``G [R, R]`` that of its output gradients (LLM Surgeon, section 3; K-FAC with
"expand" weight sharing: each token is one sample). With ``g`` the gradient of the *summed* token
loss, ``½ tr(G Δ A Δᵀ)`` estimates the growth of the *mean* token loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer


@dataclass(frozen=True)
class LayerFactors:
    """Curvature of one layer; None stands for the identity, which is never materialised.

    Attributes:
        A_CC: second moment of the inputs, the constant 1 of a bias last.
        G_RR: second moment of the output gradients.
        a_key: layers with equal keys share the very same A.
    """

    A_CC: Tensor | None
    G_RR: Tensor | None
    a_key: str


@dataclass
class CurvatureFactors:
    """Curvature of all layers.

    Attributes:
        layers: by layer index.
        tokens: N, tokens that went into the moments.
        loss: mean next-token loss over the calibration windows, in nats; None if the kind runs no data.
    """

    layers: list[LayerFactors] = field(default_factory=list)
    tokens: int = 0
    loss: float | None = None


class Estimator(Protocol):
    """A kind of curvature."""

    def __call__(
        self,
        model: PreTrainedModel,
        layers: tuple[PrunableLayer, ...],
        windows: Windows | None,
        *,
        batch_tokens: int,
        accumulate: torch.dtype,
        advance: Callable[[int], None],
    ) -> CurvatureFactors:
        """Estimate the factors; ``advance(k)`` is called as windows are done.

        ``windows`` may be None only for a kind that runs no data.
        """


_REGISTRY: dict[str, Estimator] = {}


def register(name: str, estimator: Estimator) -> None:
    """Make a kind of curvature known by name."""
    _REGISTRY[name] = estimator


def estimator_for(name: str) -> Estimator:
    """The estimator of a kind of curvature."""
    return _REGISTRY[name]
