"""What curvature is to the rest of the package, and the registry of its kinds.

The Fisher of a layer is approximated by ``G ⊗ A`` (δW row-major), ``A [C, C]`` the second moment of
its inputs and ``G [R, R]`` that of its output gradients (LLM Surgeon, section 3; K-FAC with
"expand" weight sharing: each token is one sample). With ``g`` the gradient of the *summed* token
loss, ``½ tr(G Δ A Δᵀ)`` estimates the growth of the *mean* token loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer

FISHERS = ("empirical", "mc")


@dataclass(frozen=True)
class CurvatureOptions:
    """What a kind of curvature may be asked for; a kind ignores what does not concern it.

    Attributes:
        fisher: where the labels come from. ``empirical``: the data's own next tokens. ``mc``: drawn
            from the model's own predictions (Monte-Carlo Fisher).
        fisher_samples: how many draws of all labels for one forward pass (``mc``).
        terms: K, how many Kronecker products are summed (``kron``).
        iterations: power iterations a term, two passes over the data each (``kron``).
        seed: of the draws (``mc``).

    Raises:
        ConfigError: a value is out of range.
    """

    fisher: str = "empirical"
    fisher_samples: int = 1
    terms: int = 1
    iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fisher not in FISHERS:
            raise ConfigError(f"unknown Fisher {self.fisher!r}: choose one of {', '.join(FISHERS)}")
        for name, least in (("fisher_samples", 1), ("terms", 1), ("iterations", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def sampled(self) -> bool:
        """Whether labels are drawn from the model."""
        return self.fisher == "mc"


DEFAULT_OPTIONS = CurvatureOptions()


@dataclass(frozen=True)
class LayerFactors:
    """Curvature of one layer; None stands for the identity, which is never materialised.

    Attributes:
        A_CC: second moment of the inputs, the constant 1 of a bias last.
        G_RR: second moment of the output gradients.
        a_key: layers with equal keys share the very same A.
        more: further terms ``(G_k, A_k)``: the Fisher is ``G ⊗ A + Σ G_k ⊗ A_k``. They are symmetric
            but in general indefinite.
    """

    A_CC: Tensor | None
    G_RR: Tensor | None
    a_key: str
    more: tuple[tuple[Tensor, Tensor], ...] = ()


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
        options: CurvatureOptions = DEFAULT_OPTIONS,
    ) -> CurvatureFactors:
        """Estimate the factors.

        ``windows`` may be None only for a kind that runs no data. ``advance(k)`` is called as work is
        done; the k add up to the number of windows, however often they are passed over.
        """


_REGISTRY: dict[str, Estimator] = {}


def register(name: str, estimator: Estimator) -> None:
    """Make a kind of curvature known by name."""
    _REGISTRY[name] = estimator


def estimator_for(name: str) -> Estimator:
    """The estimator of a kind of curvature."""
    return _REGISTRY[name]
