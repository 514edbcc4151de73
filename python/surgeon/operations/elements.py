"""Single weights and N:M groups of every layer (LLM Surgeon, sections 3.2 to 3.4).

Masks live in the weights: what is zero is gone. Costs ``W² ∘ Σ r cᵀ`` are made from two vectors a
layer whenever they are looked at, and never kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from surgeon import costs
from surgeon.errors import PatternError
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.solvers import Alive, Solvers, find_alive, lower, sub_factors
from surgeon.schedule import ElementLedger, group_capacity
from surgeon.select import ElementCosts, ElementSelection, nm_keep
from surgeon.structures import Update
from surgeon.update import remove_elements, remove_elements_chunked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.curvature import LayerFactors
    from surgeon.layers import PrunableLayer
    from surgeon.operations.solvers import SubFactors
    from surgeon.schedule import Books
    from surgeon.structures import NMPattern


class ElementsShot(ShotOperations):
    """Single weights, or N:M groups, in one shot.

    Weights of dead rows and columns count as removed and become zero (not so for N:M, where they are
    merely the first to go). N:M groups lie on the full weight, the bias is in none of them; of a group
    that goes, the cheapest weights beyond N do, and groups compete by their mean cost.
    """

    def __init__(self, layers: Sequence[PrunableLayer], config: PruneConfig, ledger: ElementLedger) -> None:
        self._layers = layers
        self._config = config
        self._ledger = ledger
        self._pattern = config.structure_value.pattern
        self._obs = config.method_value.updates
        self._dtype = getattr(torch, config.precision)
        self._solvers = Solvers(layers, config)
        self._alive: list[Alive] = []
        self._importance: list[list[tuple[Tensor, Tensor]]] = []
        self._table: dict[int, Tensor] = {}
        self._dead = 0
        self._available = 0  # in N:M groups
        self._full = False
        self._selection: ElementSelection | None = None

    @property
    def damping_events(self) -> list[DampingEvent]:
        """Every climb of the damping ladder so far."""
        return self._solvers.events

    def measure(self, index: int, W_RC: Tensor, factors: LayerFactors) -> None:
        """What a layer's costs are made from: a vector over its rows and one over its columns."""
        alive = find_alive(W_RC, factors)
        self._alive.append(alive)
        sub = sub_factors(factors, alive)
        if self._obs and sub.more and not alive.none:
            inverse = self._solvers.two_terms(index, sub).element_inverse_diagonal()
            self._table[index] = alive.put(inverse.reciprocal().to(W_RC.dtype), torch.zeros_like(W_RC))
        self._importance.append([] if alive.none else self._vectors(index, W_RC, sub, alive))
        standing = self._standing(index, W_RC)
        self._dead += W_RC.numel() - int(standing.sum())
        if self._pattern is not None:
            in_groups = _groups(standing[:, : self._layers[index].inputs], self._pattern.group).sum(-1)
            self._available += int((in_groups - self._pattern.keep).clamp(min=0).sum())

    def _vectors(self, index: int, W_RC: Tensor, sub: SubFactors, alive: Alive) -> list[tuple[Tensor, Tensor]]:
        pairs: list[tuple[Tensor | None, Tensor | None]]
        if index in self._table:
            return []
        if self._obs:
            g, a = self._solvers.g_inverse(index, sub), self._solvers.a_inverse(index, sub)
            pairs = [(None if g is None else g.reciprocal(), None if a is None else a.reciprocal())]
        else:
            pairs = [(None if G is None else G.diagonal(), None if A is None else A.diagonal()) for G, A in sub.terms]
        return [(_spread(r, alive.rows, W_RC), _spread(c, alive.columns, W_RC)) for r, c in pairs]

    def _standing(self, index: int, W_RC: Tensor) -> Tensor:
        """Which weights are not gone before the shot, bool ``[R, C]``."""
        standing = W_RC != 0
        if self._pattern is None:
            alive = self._alive[index]
            standing &= alive.rows[:, None] & alive.columns[None, :]
        return standing

    def _costs(self, index: int, W_RC: Tensor) -> ElementCosts:
        standing = self._standing(index, W_RC)
        if index in self._table:
            cost = 0.5 * self._table[index] * W_RC.square()
        else:
            cost = costs.element_costs(W_RC, self._importance[index])
        if self._pattern is None:
            return ElementCosts(index, cost, standing)
        return _group_costs(index, cost, standing, self._pattern, self._layers[index].inputs)

    def _stream(self) -> Iterator[ElementCosts]:
        for index, layer in enumerate(self._layers):
            yield self._costs(index, layer.read(self._dtype))

    def select(self, target: int) -> Selected:
        """Choose weights or groups over all layers."""
        self._solvers.forget()
        names = [layer.name for layer in self._layers]
        rank = max(target - self._dead, 0)
        if self._pattern is not None:
            # Zeros elsewhere (a bias, more than a group needs) are no reason to leave a group as it is.
            self._full = target >= group_capacity(self._layers, self._pattern)
            rank = self._available if self._full else min(rank, self._available)
        self._selection = ElementSelection(self._stream, rank, names)
        return Selected(self._dead + rank, self._selection.threshold, rank)

    def apply(self, index: int, W_RC: Tensor, factors: LayerFactors) -> Applied:
        """Remove a layer's chosen weights and update the others."""
        assert self._selection is not None, "select() comes first"
        alive, part = self._alive[index], self._costs(index, W_RC)
        gone = self._selection.gone(part)
        if self._pattern is not None:
            gone = _whole_groups(gone, part.candidates, self._pattern)
        keep = self._standing(index, W_RC) & ~gone
        new, increase = W_RC * keep, 0.0
        if not alive.none:
            W, sub = alive.take(W_RC), sub_factors(factors, alive)
            W_new = self._updated(index, W, alive.take(keep), sub)
            increase = self._solvers.increase(index, sub, W_new - W)
            alive.put(W_new, new)
        if self._pattern is not None:
            self._check_groups(index, new, gone)
        self._ledger.book(index, (new != 0).cpu().numpy())
        return Applied(new, increase)

    def _updated(self, index: int, W: Tensor, keep: Tensor, sub: SubFactors) -> Tensor:
        update = self._config.update_value
        if update is Update.NONE or bool((keep | (W == 0)).all()):
            return W * keep
        if update is Update.CHUNKED:
            G, A = lower(self._solvers.g(index, sub)), lower(self._solvers.a(index, sub))
            return remove_elements_chunked(W, keep, G, A, chunk=self._config.chunk)
        return remove_elements(W, keep, self._solvers.damped_terms(index, sub)).W_RC

    def _check_groups(self, index: int, W_RC: Tensor, gone: Tensor) -> None:
        pattern, layer = self._pattern, self._layers[index]
        assert pattern is not None
        left = _groups(W_RC[:, : layer.inputs] != 0, pattern.group).sum(-1)
        touched = _groups(gone[:, : layer.inputs], pattern.group).any(-1) | self._full
        if bool((left[touched] > pattern.keep).any()):
            raise PatternError(f"layer {layer.name} does not hold {pattern}", layer=layer.name)

    def commit(self, books: Books) -> None:
        """Close the shot's books; every layer was booked as it was changed."""
        assert books is self._ledger
        self._ledger.commit()


def _spread(values: Tensor | None, alive: Tensor, like: Tensor) -> Tensor:
    """A vector over what is alive, as one over everything, zero elsewhere."""
    full = torch.zeros(alive.shape[0], dtype=like.dtype, device=like.device)
    full[alive] = 1.0 if values is None else values.to(like.dtype)
    return full


def _groups(values: Tensor, group: int) -> Tensor:
    """Consecutive columns in groups, ``[R, ⌈C / M⌉, M]``; a short last group is filled with zeros."""
    missing = -values.shape[1] % group
    return functional.pad(values, (0, missing)).reshape(values.shape[0], -1, group)


def _group_costs(index: int, cost_RC: Tensor, standing: Tensor, pattern: NMPattern, inputs: int) -> ElementCosts:
    """The candidates are the cheapest weights beyond N of each group, each at its group's mean cost."""
    # What is gone already goes first: of equal costs it must not be spared at a standing weight's expense.
    weights = cost_RC[:, :inputs].masked_fill(~standing[:, :inputs], -1.0)
    going = ~nm_keep(weights, pattern.keep, pattern.group) & standing[:, :inputs]
    grouped = _groups(going, pattern.group)
    mean = _groups(weights * going, pattern.group).sum(-1) / grouped.sum(-1).clamp(min=1)
    spread = mean[..., None].expand(grouped.shape).flatten(1)[:, :inputs]
    beside = (0, cost_RC.shape[1] - inputs)
    return ElementCosts(index, functional.pad(spread, beside), functional.pad(going, beside))


def _whole_groups(gone: Tensor, candidates: Tensor, pattern: NMPattern) -> Tensor:
    """A group that goes goes whole: the threshold may cut through the last one."""
    touched = _groups(gone, pattern.group).any(-1, keepdim=True).expand(-1, -1, pattern.group)
    return candidates & touched.flatten(1)[:, : gone.shape[1]]
