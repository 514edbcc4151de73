"""How much has to be gone after each shot, in exact counts of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon import _core
from surgeon._core import Ledger
from surgeon.config import parse_size
from surgeon.errors import ConfigError

if TYPE_CHECKING:
    from surgeon.config import PruneConfig

__all__ = ["Ledger", "shot_targets"]


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
        target = _core.removal_target(prunable, config.sparsity or 0.0)
    return _core.linear_schedule(prunable, target, config.shots)
