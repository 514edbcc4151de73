"""Operations: one file a structure, with one object a shot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.models import unit_groups
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.coupled import CoupledShot
from surgeon.operations.elements import ElementsShot
from surgeon.operations.layerwise import LayerwiseShot
from surgeon.operations.rows_columns import RowsColumnsShot
from surgeon.schedule import ElementLedger, Ledger
from surgeon.structures import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from surgeon.config import PruneConfig
    from surgeon.models import Matched
    from surgeon.schedule import Books

__all__ = ["Applied", "DampingEvent", "LayerwiseShot", "Selected", "ShotOperations", "begin_shot"]


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
        kinds = frozenset(part.removesuffix("s") for part in structure.parts)
        return CoupledShot(matched.layers, unit_groups(matched, model_config, kinds), config, books)
    return RowsColumnsShot(matched.layers, config, books)
