"""Operations: one file a structure, with one object a shot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.rows_columns import RowsColumnsShot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgeon.config import PruneConfig
    from surgeon.layers import PrunableLayer
    from surgeon.schedule import Ledger

__all__ = ["Applied", "DampingEvent", "Selected", "ShotOperations", "begin_shot"]


def begin_shot(layers: Sequence[PrunableLayer], config: PruneConfig, ledger: Ledger) -> ShotOperations:
    """The operations object of a configuration's structure, for one shot."""
    # All of today's structures are rows, columns or both; which of them may go is the selection's business.
    return RowsColumnsShot(layers, config, ledger)
