"""Slow truths about the layer-wise baselines: plain loops, explicit inverses, exact fractions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def count(total: int, fraction: str) -> int:
    """The ceiling in rational numbers; the fraction as it is written."""
    return ceil(total * Fraction(fraction))


def cheapest(costs: Sequence[float], removed: int) -> set[int]:
    """Indices of the smallest costs, the lower index first among equal ones."""
    return {index for _, index in sorted((cost, index) for index, cost in enumerate(costs))[:removed]}


def wanda(W: Tensor, X: Tensor, fraction: str) -> Tensor:
    """Keep mask from the inputs themselves, one row after the other."""
    keep = torch.ones(W.shape, dtype=torch.bool)
    norms = [sum(float(X[n, c]) ** 2 for n in range(X.shape[0])) ** 0.5 for c in range(X.shape[1])]
    for r in range(W.shape[0]):
        costs = [abs(float(W[r, c])) * norms[c] for c in range(W.shape[1])]
        for c in cheapest(costs, count(W.shape[1], fraction)):
            keep[r, c] = False
    return keep


def eliminate(W: Tensor, H: Tensor, keep: Tensor, until: int | None = None) -> Tensor:
    """Classical OBS with given masks: row by row, column by column, on the columns that remain.

    Args:
        W: weights before.
        H: damped second moment.
        keep: True where a weight stays.
        until: stop at the entrance of this column; None: all columns.
    """
    W = W.clone()
    for r in range(W.shape[0]):
        for c in range(W.shape[1] if until is None else until):
            if keep[r, c]:
                continue
            inverse = torch.linalg.inv(H[c:, c:])
            W[r, c:] -= W[r, c] / inverse[0, 0] * inverse[0]
            W[r, c] = 0.0
    return W


def removal_costs(W: Tensor, H: Tensor, zero: Tensor) -> Tensor:
    """What OBS says that a weight costs when all columns before it are fixed; nothing for old zeros."""
    costs = torch.zeros_like(W)
    for c in range(W.shape[1]):
        costs[:, c] = W[:, c] ** 2 / torch.linalg.inv(H[c:, c:])[0, 0]
    costs[zero] = -1.0
    return costs


def block_mask(costs: Tensor, fraction: str) -> Tensor:
    """Keep mask of a block of columns under one threshold for all its rows."""
    gone = cheapest(costs.reshape(-1).tolist(), count(costs.numel(), fraction))
    return torch.tensor([index not in gone for index in range(costs.numel())]).reshape(costs.shape)


def group_mask(costs: Tensor, keep: int) -> Tensor:
    """Keep mask of one group of columns, row by row."""
    mask = torch.ones(costs.shape, dtype=torch.bool)
    for r, row in enumerate(costs):
        for c in cheapest(row.tolist(), max(len(row) - keep, 0)):
            mask[r, c] = False
    return mask


def _keeper(name: str, inputs: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def keep(_module: nn.Module, args: tuple[Tensor]) -> None:
        inputs[name] = args[0]

    return keep


def input_moments(
    model: PreTrainedModel, modules: dict[str, nn.Module], windows: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Mean of a aᵀ over all tokens; the whole model on each window alone, without padding."""
    sums: dict[str, Tensor] = {}
    tokens = 0
    for ids in windows:
        inputs: dict[str, Tensor] = {}
        handles = [module.register_forward_pre_hook(_keeper(name, inputs)) for name, module in modules.items()]
        with torch.no_grad():
            model(input_ids=ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name in modules:
            for a in inputs[name].reshape(len(ids), -1):
                sums[name] = sums.get(name, 0.0) + torch.outer(a, a)
        tokens += len(ids)
    return {name: total / tokens for name, total in sums.items()}
