"""How much has to be gone after each shot, in exact counts of parameters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from surgeon import _core
from surgeon._core import Ledger
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from surgeon.config import PruneConfig

__all__ = ["Ledger", "parse_size", "shot_targets"]

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def shot_targets(config: PruneConfig, *, prunable: int, total: int, bytes_a_parameter: int) -> list[int]:
    """Parameters gone after each shot, ``ceil(t / T · target)`` for t = 1 … T (linear schedule).

    Args:
        config: ``target_size``, else ``target_parameters``, else ``sparsity`` says how much goes.
        prunable: parameters of the layers that can be pruned.
        total: parameters of the whole model.
        bytes_a_parameter: in the checkpoint.

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
    else:
        target = _core.removal_target(prunable, config.sparsity)
    return _core.linear_schedule(prunable, target, config.shots)


def parse_size(text: str) -> int:
    """Bytes of ``12GiB`` (powers of 1024) or ``12GB`` (powers of 1000).

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is no size: write it like 12GiB or 500MB")
    unit = match.group(2).lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match.group(1)) * base ** _POWERS[unit.rstrip("i")])
