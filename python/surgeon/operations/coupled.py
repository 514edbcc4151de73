"""Neurons and heads: units of several layers that a stock model can really shrink by.

Removing a unit is removing its columns of the output layer (down, fc2, o): its cost is the set cost
of these columns, the update is theirs, and the rows that fed them go for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon import costs
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.solvers import Alive, Solvers, find_alive, lower, sub_factors
from surgeon.schedule import Ledger
from surgeon.select import UnitCosts, select_units
from surgeon.structures import Update
from surgeon.update import remove_columns, remove_elements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.curvature import LayerFactors
    from surgeon.layers import PrunableLayer
    from surgeon.models import UnitGroup
    from surgeon.operations.solvers import SubFactors
    from surgeon.schedule import Books


class CoupledShot(ShotOperations):
    """Neurons and heads in one shot, under one threshold.

    A unit is dead if all its output columns are (zero in W, or zero on A's diagonal), or if one of the
    parts that its output is made from is zero in W: its gate, up or fc1 row, or all value rows of its
    group. Dead units count as removed. Rows and columns outside of units are never touched: what is
    counted here is what a compact model really loses.
    """

    def __init__(
        self, layers: Sequence[PrunableLayer], groups: Sequence[UnitGroup], config: PruneConfig, ledger: Ledger
    ) -> None:
        self._layers = tuple(layers)
        self._groups = groups
        self._ledger = ledger
        self._per_parameter = config.per_parameter
        self._obs = config.method_value.updates
        self._update = config.update_value is not Update.NONE
        self._solvers = Solvers(layers, config)
        self._alive: dict[int, Alive] = {}
        self._zero_rows: dict[int, Tensor] = {}
        self._costs: dict[int, Tensor] = {}  # by group
        self._gone_rows: dict[int, Tensor] = {}
        self._gone_columns: dict[int, Tensor] = {}

    @property
    def damping_events(self) -> list[DampingEvent]:
        """Every climb of the damping ladder so far."""
        return self._solvers.events

    def measure(self, index: int, W_RC: Tensor, factors: LayerFactors) -> None:
        """Costs of the units whose output layer this is."""
        self._zero_rows[index] = (W_RC == 0).all(1).cpu()
        mine = [(number, group) for number, group in enumerate(self._groups) if group.output == index]
        if not mine:
            return
        alive = find_alive(W_RC, factors)
        self._alive[index] = alive
        if alive.none:
            for number, group in mine:
                self._costs[number] = torch.zeros(group.units, dtype=torch.float64)
            return
        W, sub = alive.take(W_RC), sub_factors(factors, alive)
        if all(group.columns.shape[1] == 1 for _, group in mine):
            each = W_RC.new_zeros(W_RC.shape[1], dtype=torch.float64)
            each[alive.columns] = self._column_costs(index, W, sub).double()
            for number, group in mine:
                self._costs[number] = each[group.columns[:, 0].to(each.device)].cpu()
            return
        place = alive.columns.cumsum(0) - 1  # of each column in the alive sub-matrix
        members = torch.cat([group.columns for _, group in mine]).to(W_RC.device)
        sets = [place[columns[alive.columns[columns]]] for columns in members]
        found = self._set_costs(index, W, sub, sets).double().cpu()
        for (number, _), part in zip(mine, torch.split(found, [group.units for _, group in mine]), strict=True):
            self._costs[number] = part

    def _column_costs(self, index: int, W: Tensor, factors: SubFactors) -> Tensor:
        if not self._obs:
            return torch.stack([costs.column_costs_obd(W, A, G) for G, A in factors.terms]).sum(0)
        if factors.more:
            return self._solvers.two_terms(index, factors).column_costs(W)
        return costs.column_costs_obs(W, factors.G_RR, self._solvers.a_inverse(index, factors))

    def _set_costs(self, index: int, W: Tensor, factors: SubFactors, sets: list[Tensor]) -> Tensor:
        if not self._obs:
            return costs.column_set_costs_obd(W, factors.A_CC, factors.G_RR, sets)
        cholesky = lower(self._solvers.a(index, factors))
        inverse = None if cholesky is None else torch.cholesky_inverse(cholesky)
        return costs.column_set_costs_obs(W, factors.G_RR, inverse, sets)

    def select(self, target: int) -> Selected:
        """Choose units over all groups."""
        units: list[UnitCosts] = []
        for number, group in enumerate(self._groups):
            units.append(
                UnitCosts(
                    costs=self._costs[number],
                    alive=self._alive_units(group),
                    size=group.unit_size(self._layers),
                    bonus=group.shared_size(self._layers),
                )
            )
        names = [f"{group.kind} of block {group.block}" for group in self._groups]
        chosen = select_units(units, target, names, per_parameter=self._per_parameter)
        for group, keep in zip(self._groups, chosen.keep, strict=True):
            gone = ~keep
            self._mark(self._gone_columns, group.output, self._layers[group.output].columns, group.columns[gone])
            for part in group.own:
                self._mark(self._gone_rows, part.layer, self._layers[part.layer].rows, part.index[gone])
            if bool(gone.all()):
                for part in group.shared:
                    self._mark(self._gone_rows, part.layer, self._layers[part.layer].rows, part.index)
        self._solvers.forget()
        return Selected(chosen.removed, chosen.threshold, chosen.units)

    def _alive_units(self, group: UnitGroup) -> Tensor:
        columns = self._alive[group.output].columns.cpu()
        alive = columns[group.columns].any(1)
        for part in group.sources:
            alive &= ~self._zero_rows[part.layer][part.index].all(1)
        return alive

    @staticmethod
    def _mark(into: dict[int, Tensor], layer: int, size: int, index: Tensor) -> None:
        mask = into.setdefault(layer, torch.zeros(size, dtype=torch.bool))
        mask[index.flatten()] = True

    def apply(self, index: int, W_RC: Tensor, factors: LayerFactors) -> Applied:
        """Zero what went; where columns went, update the others jointly."""
        new, increase = W_RC.clone(), 0.0
        gone = self._gone_columns.get(index)
        if gone is not None and bool(gone.any()):
            gone = gone.to(W_RC.device)
            alive = self._alive[index]
            removed = gone[alive.columns].nonzero().flatten()
            if removed.numel():
                W, sub = alive.take(W_RC), sub_factors(factors, alive)
                W_new, increase = self._without(index, W, sub, removed)
                alive.put(W_new, new)
            new[:, gone] = 0.0
        rows = self._gone_rows.get(index)
        if rows is not None:
            new[rows.to(W_RC.device)] = 0.0
        return Applied(new, increase)

    def _without(self, index: int, W: Tensor, factors: SubFactors, columns: Tensor) -> tuple[Tensor, float]:
        """Weights without some columns, and what that is predicted to cost."""
        if self._update and not factors.more:
            removal = remove_columns(W, lower(self._solvers.a(index, factors)), factors.G_RR, columns)
            return removal.W_RC, float(removal.cost)
        if self._update:
            keep = torch.ones_like(W, dtype=torch.bool).index_fill_(1, columns, value=False)
            new = remove_elements(W, keep, self._solvers.damped_terms(index, factors)).W_RC
        else:
            new = W.index_fill(1, columns, 0.0)
        return new, self._solvers.increase(index, factors, new - W)

    def commit(self, books: Books) -> None:
        """Enter the masks into the ledger."""
        assert isinstance(books, Ledger)
        keep_rows, keep_columns = [], []
        for index in range(len(self._layers)):
            rows, columns = self._gone_rows.get(index), self._gone_columns.get(index)
            old_rows, old_columns = books.keep_rows(index), books.keep_columns(index)
            keep_rows.append(old_rows if rows is None else old_rows & ~rows.numpy())
            keep_columns.append(old_columns if columns is None else old_columns & ~columns.numpy())
        books.commit(keep_rows, keep_columns)
