"""Rows and columns of every layer, alone or together (LLM Surgeon, sections 3.2 to 3.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon import costs
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.operations.solvers import Alive, Solvers, SubFactors, close, find_alive, lower, sub_factors
from surgeon.schedule import Ledger
from surgeon.select import RowColumnCosts, RowColumnSelection, select_rows_columns
from surgeon.structures import Update
from surgeon.update import remove_columns, remove_elements, remove_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.curvature import LayerFactors
    from surgeon.layers import PrunableLayer
    from surgeon.schedule import Books


class RowsColumnsShot(ShotOperations):
    """Rows and columns in one shot.

    A row is dead if it is all zero in W, if ``G_rr = 0``, or if an earlier shot removed it; a column
    likewise with A. Dead units leave W, G and A before anything is inverted and count as removed:
    this is how a removed unit takes its partners in other layers along one shot later.
    """

    def __init__(self, layers: Sequence[PrunableLayer], config: PruneConfig, ledger: Ledger) -> None:
        self._layers = layers
        self._parts = config.structure_value.parts
        self._per_parameter = config.per_parameter
        self._obs = config.method_value.updates
        self._update = config.update_value is not Update.NONE
        self._ledger = ledger
        self._costs: list[RowColumnCosts] = []
        self._alive: list[Alive] = []
        self._selection: RowColumnSelection | None = None
        self._solvers = Solvers(layers, config)

    @property
    def damping_events(self) -> list[DampingEvent]:
        """Every climb of the damping ladder so far."""
        return self._solvers.events

    def measure(self, index: int, W_RC: Tensor, factors: LayerFactors) -> None:
        """Costs of a layer's rows and columns."""
        found = find_alive(W_RC, factors)
        alive = close(
            found.rows & torch.from_numpy(self._ledger.keep_rows(index)).to(W_RC.device),
            found.columns & torch.from_numpy(self._ledger.keep_columns(index)).to(W_RC.device),
        )
        row_costs = W_RC.new_zeros(W_RC.shape[0], dtype=torch.float64)
        column_costs = W_RC.new_zeros(W_RC.shape[1], dtype=torch.float64)
        if not alive.none:
            W = alive.take(W_RC)
            rows, columns = self._unit_costs(index, W, sub_factors(factors, alive))
            if self._per_parameter:
                rows, columns = rows / W.shape[1], columns / W.shape[0]
            row_costs[alive.rows] = rows.double()
            column_costs[alive.columns] = columns.double()
        self._alive.append(alive)
        self._costs.append(RowColumnCosts(row_costs, column_costs, alive.rows, alive.columns))

    def _unit_costs(self, index: int, W: Tensor, factors: SubFactors) -> tuple[Tensor, Tensor]:
        A, G = factors.A_CC, factors.G_RR
        if not self._obs:
            rows = torch.stack([costs.row_costs_obd(W, a, g) for g, a in factors.terms]).sum(0)
            return rows, torch.stack([costs.column_costs_obd(W, a, g) for g, a in factors.terms]).sum(0)
        if factors.more:
            both = self._solvers.two_terms(index, factors)
            return both.row_costs(W), both.column_costs(W)
        a_inverse, g_inverse = self._solvers.a_inverse(index, factors), self._solvers.g_inverse(index, factors)
        return costs.row_costs_obs(W, A, g_inverse), costs.column_costs_obs(W, G, a_inverse)

    def select(self, target: int) -> Selected:
        """Choose rows and columns over all layers."""
        names = [layer.name for layer in self._layers]
        rows, columns = "rows" in self._parts, "columns" in self._parts
        chosen = select_rows_columns(self._costs, target, names, rows=rows, columns=columns)
        self._selection = chosen
        self._solvers.forget()
        return Selected(chosen.removed, chosen.threshold, chosen.units)

    def apply(self, index: int, W_RC: Tensor, factors: LayerFactors) -> Applied:
        """Remove a layer's rows and columns and update the others jointly."""
        assert self._selection is not None, "select() comes first"
        alive = self._alive[index]
        new = torch.zeros_like(W_RC)
        if alive.none:
            return Applied(new, 0.0)
        rows = (~self._selection.keep_rows[index].to(W_RC.device)[alive.rows]).nonzero().flatten()
        columns = (~self._selection.keep_columns[index].to(W_RC.device)[alive.columns]).nonzero().flatten()
        W, sub = alive.take(W_RC), sub_factors(factors, alive)
        if self._update:
            W, increase = self._joint(index, W, sub, rows, columns)
        else:
            W_old, W = W, W.index_fill(0, rows, 0.0).index_fill_(1, columns, 0.0)
            increase = self._solvers.increase(index, sub, W - W_old)
        return Applied(alive.put(W, new), increase)

    def _joint(self, index: int, W: Tensor, factors: SubFactors, rows: Tensor, columns: Tensor) -> tuple[Tensor, float]:
        if factors.more:  # no closed form: the same optimum by conjugate gradients
            keep = (
                torch.ones_like(W, dtype=torch.bool)
                .index_fill_(0, rows, value=False)
                .index_fill_(1, columns, value=False)
            )
            new = remove_elements(W, keep, self._solvers.damped_terms(index, factors)).W_RC
            return new, self._solvers.increase(index, factors, new - W)
        increase = 0.0
        if rows.numel():
            removal = remove_rows(W, lower(self._solvers.g(index, factors)), factors.A_CC, rows)
            W, increase = removal.W_RC, float(removal.cost)
        if columns.numel():
            removal = remove_columns(W, lower(self._solvers.a(index, factors)), factors.G_RR, columns)
            W, increase = removal.W_RC, increase + float(removal.cost)
        return W, increase

    def commit(self, books: Books) -> None:
        """Enter the masks into the ledger."""
        assert self._selection is not None, "select() comes first"
        assert isinstance(books, Ledger)
        books.commit(
            [keep.numpy() for keep in self._selection.keep_rows],
            [keep.numpy() for keep in self._selection.keep_columns],
        )
