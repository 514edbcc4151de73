"""Operations: one file a structure, with one object a shot."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from surgeon.errors import ConfigError
from surgeon.models import unit_groups
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.coupled import CoupledShot
from surgeon.operations.elements import ElementsShot
from surgeon.operations.layerwise import LayerwiseShot
from surgeon.operations.rows_columns import RowsColumnsShot
from surgeon.schedule import ElementLedger, Ledger, group_capacity
from surgeon.structures import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from surgeon.config import PruneConfig
    from surgeon.models import Matched, UnitGroup
    from surgeon.schedule import Books
    from surgeon.structures import Structure

__all__ = [
    "Applied",
    "DampingEvent",
    "LayerwiseShot",
    "Selected",
    "ShotOperations",
    "begin_shot",
    "check_target",
    "most_removable",
]


def begin_shot(matched: Matched, model_config: PreTrainedConfig, config: PruneConfig, books: Books) -> ShotOperations:
    """The operations object of a configuration's structure, for one shot.

    Raises:
        ModelError: the model has no such units.
    """
    structure = config.structure_value
    if structure.elementwise:
        assert isinstance(books, ElementLedger)
        return ElementsShot(matched.layers, config, books)
    assert isinstance(books, Ledger)
    if structure.kind is Kind.COUPLED:
        return CoupledShot(matched.layers, _unit_groups(matched, model_config, structure), config, books)
    return RowsColumnsShot(matched.layers, config, books)


def most_removable(matched: Matched, model_config: PreTrainedConfig, config: PruneConfig) -> int:
    """Parameters that a structure can remove by a method."""
    structure = config.structure_value
    if structure.pattern is not None:
        return group_capacity(matched.layers, structure.pattern)
    if config.method_value.layerwise:  # biases stay, and so does something of every layer
        return sum(layer.rows * (layer.inputs - 1) for layer in matched.layers)
    if structure.kind is not Kind.COUPLED:
        return matched.parameters
    groups = _unit_groups(matched, model_config, structure)
    return sum(g.units * g.unit_size(matched.layers) + g.shared_size(matched.layers) for g in groups)


def check_target(matched: Matched, structure: Structure, target: int, most: int) -> None:
    """Refuse more than a structure can remove, before anything heavy runs.

    Raises:
        ConfigError: with how much of the prunable parameters can go.
    """
    if target > most:
        share = most / max(matched.parameters, 1)
        raise ConfigError(
            f"{target:,} parameters are to go, but {structure} can remove {most:,} at most: "
            f"ask for a sparsity of {math.floor(1000 * share) / 1000:g} or less, or choose another --structure"
        )


def _unit_groups(matched: Matched, model_config: PreTrainedConfig, structure: Structure) -> tuple[UnitGroup, ...]:
    return unit_groups(matched, model_config, frozenset(part.removesuffix("s") for part in structure.parts))
