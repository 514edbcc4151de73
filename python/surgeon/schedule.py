"""How much has to be gone after each shot, in exact counts of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon import _core
from surgeon._core import ElementLedger, Ledger
from surgeon.config import parse_size
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgeon.config import PruneConfig
    from surgeon.layers import PrunableLayer
    from surgeon.structures import NMPattern, Structure

__all__ = [
    "Books",
    "ElementLedger",
    "Ledger",
    "group_capacity",
    "open_books",
    "read_books",
    "round_targets",
    "shot_targets",
]

Books = Ledger | ElementLedger


def open_books(structure: Structure, layers: Sequence[PrunableLayer]) -> Books:
    """Empty books: of rows and columns, or of single weights whose masks are in the weights."""
    if structure.elementwise:
        return ElementLedger([layer.parameters for layer in layers])
    return Ledger([layer.shape for layer in layers])


def read_books(data: bytes, structure: Structure) -> Books:
    """The books that ``to_bytes`` wrote.

    Raises:
        SelectionError: the bytes are damaged, or books of another kind of structure.
    """
    return ElementLedger.from_bytes(data) if structure.elementwise else Ledger.from_bytes(data)


def group_capacity(layers: Sequence[PrunableLayer], pattern: NMPattern) -> int:
    """Weights that go where every N:M group is pruned; biases are in none, a short last group may keep N."""
    beyond = pattern.group - pattern.keep
    return sum(
        layer.rows * (layer.inputs // pattern.group * beyond + max(layer.inputs % pattern.group - pattern.keep, 0))
        for layer in layers
    )


def shot_targets(
    config: PruneConfig, *, prunable: int, total: int, bytes_a_parameter: int, most: int | None = None
) -> list[int]:
    """Parameters gone after each shot, ``ceil(t / T · target)`` for t = 1 … T (linear schedule).

    Args:
        config: ``target_size``, else ``target_parameters``, else ``sparsity`` says how much goes.
        prunable: parameters of the layers that can be pruned.
        total: parameters of the whole model.
        bytes_a_parameter: in the checkpoint.
        most: what all N:M groups together free; the target where the settings ask for all of them.

    Raises:
        ConfigError: the budget is larger than the model, or smaller than what cannot be pruned.
    """
    if config.target_size is not None or config.target_parameters is not None:
        if config.target_size is not None:
            budget = parse_size(config.target_size) // bytes_a_parameter
        else:
            budget = int(config.target_parameters or 0)
        target = total - budget
        if target < 0:
            raise ConfigError(f"the model has {total:,} parameters, fewer than the {budget:,} it may keep")
        if target >= prunable:
            raise ConfigError(
                f"{budget:,} parameters are too few: {total - prunable:,} of the model's {total:,} cannot be pruned"
            )
    elif most is not None and config.all_groups:
        target = most
    else:
        target = _core.removal_target(prunable, config.sparsity or 0.0)
    return _core.linear_schedule(prunable, target, config.shot_count)


def round_targets(books: Books, target: int, rounds: int) -> list[int]:
    """Parameters gone after each round of a shot that ends at ``target``, in equal steps from where it stands."""
    left = max(target - books.removed, 0)
    return [books.removed + step for step in _core.linear_schedule(books.total, left, rounds)]
