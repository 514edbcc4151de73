"""Slow truths of the selection core: sort everything, remove one thing after the other, recount."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import TargetError

Costs = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Refused(NamedTuple):
    """What a `TargetError` says."""

    requested: int
    available: int


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a call, or what its `TargetError` says."""
    try:
        return function(*arguments, **options)
    except TargetError as error:
        return Refused(error.requested, error.available)


def count_removed(keep_rows: Sequence[Mask], keep_columns: Sequence[Mask]) -> int:
    """Parameters that are gone, each matrix written out in full."""
    pairs = zip(keep_rows, keep_columns, strict=True)
    return sum(int((~np.logical_and.outer(rows, columns)).sum()) for rows, columns in pairs)


def rows_columns(
    row_costs: Sequence[Costs],
    column_costs: Sequence[Costs],
    alive_rows: Sequence[Mask],
    alive_columns: Sequence[Mask],
    target: int,
    *,
    rows: bool = True,
    columns: bool = True,
) -> tuple[list[Mask], list[Mask], int, float, int]:
    """Row masks, column masks, removed, threshold, units removed."""
    keep = [[mask.copy() for mask in alive_rows], [mask.copy() for mask in alive_columns]]
    order = [
        (float(cost), layer, kind, index)
        for kind, (side, wanted) in enumerate([(row_costs, rows), (column_costs, columns)])
        if wanted
        for layer, costs in enumerate(side)
        for index, cost in enumerate(costs)
        if keep[kind][layer][index]
    ]
    threshold, units = -np.inf, 0
    for cost, layer, kind, index in sorted(order):
        if count_removed(*keep) >= target:
            break
        keep[kind][layer][index] = False
        threshold, units = cost, units + 1
    removed = count_removed(*keep)
    if removed < target:
        raise TargetError(target, removed)
    return keep[0], keep[1], removed, threshold, units


def units(
    costs: Sequence[Costs],
    sizes: Sequence[NDArray[np.uint64]],
    alive: Sequence[Mask],
    target: int,
    *,
    per_parameter: bool = False,
    bonus: Sequence[int] | None = None,
) -> tuple[list[Mask], int, float, int]:
    """Masks, removed, threshold, units removed."""
    extra = [0] * len(costs) if bonus is None else [int(parameters) for parameters in bonus]

    def count() -> int:
        gone = sum(int(size[~mask].sum()) for size, mask in zip(sizes, keep, strict=True))
        return gone + sum(parameters for parameters, mask in zip(extra, keep, strict=True) if not mask.any())

    keep = [mask.copy() for mask in alive]
    order = []
    for layer, (layer_costs, layer_sizes) in enumerate(zip(costs, sizes, strict=True)):
        for index in np.flatnonzero(keep[layer]):
            cost, size = float(layer_costs[index]), float(layer_sizes[index])
            order.append((cost / size if per_parameter else cost, layer, int(index)))
    threshold, number = -np.inf, 0
    for score, place, unit in sorted(order):
        if count() >= target:
            break
        keep[place][unit] = False
        threshold, number = score, number + 1
    removed = count()
    if removed < target:
        raise TargetError(target, removed)
    return keep, removed, threshold, number


def elements(
    costs: Sequence[NDArray[Any]], rank: int, alive: Sequence[Mask]
) -> tuple[float, int, int, int, list[Mask]]:
    """Threshold, below, ties, count and masks by one stable sort of everything."""
    keep = [mask.copy() for mask in alive]
    flat = np.concatenate([np.zeros(0), *(layer[mask] for layer, mask in zip(costs, keep, strict=True))])
    if rank > flat.size:
        raise TargetError(rank, flat.size)
    order = np.argsort(flat, kind="stable")
    stays = np.ones(flat.size, bool)
    stays[order[:rank]] = False
    start = 0
    for mask in keep:
        size = int(mask.sum())
        mask[mask] = stays[start : start + size]
        start += size
    cost = float(flat[order[rank - 1]]) if rank else -np.inf
    below = int((flat < cost).sum())
    return cost, below, rank - below, int(flat.size), keep


def nm(costs: NDArray[Any], keep: int, group: int, columns: int | None = None) -> Mask:
    """Sort each group by (cost, index) and drop all but the last `keep`."""
    mask = np.ones(costs.shape, bool)
    width = costs.shape[1] if columns is None else columns
    for row in range(costs.shape[0]):
        for start in range(0, width, group):
            members = np.arange(start, min(start + group, width))
            order = members[np.argsort(costs[row, members], kind="stable")]
            mask[row, order[: max(len(order) - keep, 0)]] = False
    return mask


def removal_target(total: int, sparsity: str) -> int:
    """The ceiling in rational numbers; the sparsity as it is written."""
    return ceil(total * Fraction(sparsity))


def linear_schedule(target: int, shots: int) -> list[int]:
    """The ceilings in rational numbers."""
    return [ceil(Fraction(target * shot, shots)) for shot in range(1, shots + 1)]
