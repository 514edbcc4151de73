"""Rows and columns of every layer, alone or together (LLM Surgeon, sections 3.2 to 3.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon import costs
from surgeon.linalg import Cholesky, damped_cholesky, inverse_diagonal, solve_dtype
from surgeon.operations.base import Applied, DampingEvent, Selected, ShotOperations
from surgeon.select import RowColumnCosts, RowColumnSelection, select_rows_columns
from surgeon.update import remove_columns, remove_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from surgeon.config import PruneConfig
    from surgeon.curvature import LayerFactors
    from surgeon.layers import PrunableLayer
    from surgeon.schedule import Ledger


@dataclass(frozen=True)
class _Alive:
    """Indices of a layer's rows and columns that are still there."""

    rows: Tensor
    columns: Tensor


class RowsColumnsShot(ShotOperations):
    """Rows and columns in one shot.

    A row is dead if it is all zero in W, if ``G_rr = 0``, or if an earlier shot removed it; a column
    likewise with A. Dead units leave W, G and A before anything is inverted and count as removed:
    this is how a removed unit takes its partners in other layers along one shot later.
    """

    def __init__(self, layers: Sequence[PrunableLayer], config: PruneConfig, ledger: Ledger) -> None:
        self._layers = layers
        self._config = config
        self._ledger = ledger
        self._updates = config.method_value.updates
        self._costs: list[RowColumnCosts] = []
        self._alive: list[_Alive] = []
        self._selection: RowColumnSelection | None = None
        self._events: list[DampingEvent] = []
        # The last A only: layers that share one follow each other.
        self._last_A: tuple[tuple[str, bytes], Cholesky, Tensor] | None = None

    @property
    def damping_events(self) -> list[DampingEvent]:
        """Every climb of the damping ladder so far."""
        return self._events

    def measure(self, index: int, W_RC: Tensor, factors: LayerFactors) -> None:
        """Costs of a layer's rows and columns."""
        alive_rows = torch.from_numpy(self._ledger.keep_rows(index)).to(W_RC.device) & (W_RC != 0).any(1)
        alive_columns = torch.from_numpy(self._ledger.keep_columns(index)).to(W_RC.device) & (W_RC != 0).any(0)
        if factors.G_RR is not None:
            alive_rows &= factors.G_RR.diagonal() > 0
        if factors.A_CC is not None:
            alive_columns &= factors.A_CC.diagonal() > 0
        # Without rows there are no columns, and the other way round.
        alive_rows &= alive_columns.any()
        alive_columns &= alive_rows.any()
        alive = _Alive(alive_rows.nonzero().flatten(), alive_columns.nonzero().flatten())
        row_costs = W_RC.new_zeros(W_RC.shape[0], dtype=torch.float64)
        column_costs = W_RC.new_zeros(W_RC.shape[1], dtype=torch.float64)
        if alive.rows.numel():
            rows, columns = self._alive_costs(index, W_RC, factors, alive)
            row_costs[alive.rows] = rows.double()
            column_costs[alive.columns] = columns.double()
        self._alive.append(alive)
        self._costs.append(RowColumnCosts(row_costs, column_costs, alive_rows, alive_columns))

    def _alive_costs(self, index: int, W_RC: Tensor, factors: LayerFactors, alive: _Alive) -> tuple[Tensor, Tensor]:
        W = W_RC[alive.rows][:, alive.columns]
        A, G = _sub(factors.A_CC, alive.columns), _sub(factors.G_RR, alive.rows)
        if not self._updates:
            return costs.row_costs_obd(W, A, G), costs.column_costs_obd(W, A, G)
        assert A is not None and G is not None, "OBS costs need factors"  # noqa: PT018
        a_inverse = self._A_solver(index, A, factors.a_key, alive.columns)[1].to(W.dtype)
        g_inverse = inverse_diagonal(self._cholesky(index, G, "G").L_nn).to(W.dtype)
        return costs.row_costs_obs(W, A, g_inverse), costs.column_costs_obs(W, G, a_inverse)

    def select(self, target: int) -> Selected:
        """Choose rows and columns over all layers."""
        structure = self._config.structure_value
        names = [layer.name for layer in self._layers]
        chosen = select_rows_columns(self._costs, target, names, rows=structure.rows, columns=structure.columns)
        self._selection = chosen
        self._last_A = None
        return Selected(chosen.removed, chosen.threshold, chosen.units)

    def apply(self, index: int, W_RC: Tensor, factors: LayerFactors) -> Applied:
        """Remove a layer's rows and columns and update the others jointly."""
        assert self._selection is not None, "select() comes first"
        alive = self._alive[index]
        keep_rows = self._selection.keep_rows[index].to(W_RC.device)
        keep_columns = self._selection.keep_columns[index].to(W_RC.device)
        new = torch.zeros_like(W_RC)
        if not alive.rows.numel():
            return Applied(new, 0.0)
        W = W_RC[alive.rows][:, alive.columns]
        A, G = _sub(factors.A_CC, alive.columns), _sub(factors.G_RR, alive.rows)
        rows = (~keep_rows[alive.rows]).nonzero().flatten()
        columns = (~keep_columns[alive.columns]).nonzero().flatten()
        if self._updates:
            assert A is not None and G is not None, "updates need factors"  # noqa: PT018
            increase = 0.0
            if rows.numel():
                removal = remove_rows(W, self._cholesky(index, G, "G", record=False).L_nn, A, rows)
                W, increase = removal.W_RC, float(removal.cost)
            if columns.numel():
                cholesky = self._A_solver(index, A, factors.a_key, alive.columns, record=False)[0]
                removal = remove_columns(W, cholesky.L_nn, G, columns)
                W, increase = removal.W_RC, increase + float(removal.cost)
        else:
            W_old, W = W, W.index_fill(0, rows, 0.0).index_fill_(1, columns, 0.0)
            increase = float(costs.quadratic_increase(W - W_old, A, G))
        new[alive.rows[:, None], alive.columns[None, :]] = W
        return Applied(new, increase)

    def commit(self, ledger: Ledger) -> None:
        """Enter the masks into the ledger."""
        assert self._selection is not None, "select() comes first"
        ledger.commit(
            [keep.numpy() for keep in self._selection.keep_rows],
            [keep.numpy() for keep in self._selection.keep_columns],
        )

    def _A_solver(
        self, index: int, A_CC: Tensor, a_key: str, columns: Tensor, *, record: bool = True
    ) -> tuple[Cholesky, Tensor]:
        key = (a_key, columns.cpu().numpy().tobytes())
        if self._last_A is not None and self._last_A[0] == key:
            self._record(index, "A", self._last_A[1], record=record)
        else:
            cholesky = self._cholesky(index, A_CC, "A", record=record)
            self._last_A = (key, cholesky, inverse_diagonal(cholesky.L_nn) if record else A_CC.new_zeros(0))
        return self._last_A[1], self._last_A[2]

    def _cholesky(self, index: int, M_nn: Tensor, what: str, *, record: bool = True) -> Cholesky:
        asked = self._config.damping_a if what == "A" else self._config.damping_g
        name = self._layers[index].name
        found = damped_cholesky(M_nn.to(solve_dtype(M_nn, asked)), asked, what=what, layer=name)
        self._record(index, what, found, record=record)
        return found

    def _record(self, index: int, what: str, found: Cholesky, *, record: bool) -> None:
        if record and found.ladder_step:
            asked = self._config.damping_a if what == "A" else self._config.damping_g
            self._events.append(DampingEvent(self._layers[index].name, what, asked, found.relative, found.ladder_step))


def _sub(M_nn: Tensor | None, index: Tensor) -> Tensor | None:
    """The sub-matrix of some rows and the same columns; the very same tensor if these are all."""
    if M_nn is None or index.numel() == M_nn.shape[0]:
        return M_nn
    return M_nn[index[:, None], index[None, :]]
