"""SparseGPT and Wanda in one shot: what they do to a layer once its inputs are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.layerwise import InverseFactor, eliminate, input_norms, inverse_factor, wanda_mask, wanda_nm_mask
from surgeon.operations.base import DampingEvent
from surgeon.structures import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.layers import PrunableLayer
    from surgeon.schedule import ElementLedger


class LayerwiseShot:
    """Every layer to the same sparsity; biases stay, so the weights go a little further.

    Args:
        layers: by layer index.
        config: method, structure and damping.
        target: parameters gone after the shot.
    """

    def __init__(self, layers: Sequence[PrunableLayer], config: PruneConfig, target: int) -> None:
        self._layers = layers
        self._config = config
        self._pattern = config.structure_value.pattern
        self._fraction = target / sum(layer.rows * layer.inputs for layer in layers)
        # The last one only: layers that share their inputs follow each other.
        self._factor: tuple[Tensor, InverseFactor] | None = None
        self.damping_events: list[DampingEvent] = []

    def prune_layer(self, index: int, W_RC: Tensor, A_CC: Tensor) -> Tensor:
        """New weights of a layer; weights and inputs' second moment without the bias."""
        name, pattern = self._layers[index].name, self._pattern
        if self._config.method_value is Method.SPARSEGPT:
            return eliminate(
                W_RC,
                self._inverse_factor(A_CC, name),
                fraction=self._fraction if pattern is None else None,
                pattern=None if pattern is None else (pattern.keep, pattern.group),
                layer=name,
            )
        norms = input_norms(A_CC)
        if pattern is None:
            keep = wanda_mask(W_RC, norms, self._fraction, layer=name)
        else:
            keep = wanda_nm_mask(W_RC, norms, pattern.keep, pattern.group, layer=name)
        return W_RC * keep

    def _inverse_factor(self, A_CC: Tensor, name: str) -> InverseFactor:
        if self._factor is None or self._factor[0] is not A_CC:
            self._factor = (A_CC, inverse_factor(A_CC, self._config.damping_a, layer=name))
        found = self._factor[1]
        if found.ladder_step:
            self.damping_events.append(DampingEvent(name, "A", found.asked, found.relative, found.ladder_step))
        return found

    def commit(self, books: ElementLedger) -> int:
        """Enter what went into the books; returns how many weights went now."""
        for index, layer in enumerate(self._layers):
            books.book(index, (layer.read(layer.weight.dtype) != 0).cpu().numpy())
        return books.commit()
