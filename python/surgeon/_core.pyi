"""Exact, deterministic selection of what a pruned model loses (compiled).

Rules that hold everywhere:

* Order: candidates are ranked by (cost, layer, kind, index), ascending; rows stand before columns;
  ``-0.0`` is ``+0.0``; negative costs are numbers like others. The number of threads never shows.
* Target: parameters removed *in total*, dead ones included. The result is the shortest prefix of
  the order that reaches the target; if what is dead reaches it alone, nothing more goes.
* Refusal: NaN or infinity among the candidates raises `NonFiniteCostError`. Costs of what is dead
  are never looked at.

Wrong shapes, dtypes and counts raise `surgeon.errors.SelectionError`. Contiguous arrays are read
without a copy; others are copied one at a time. Arrays must not be written to while a call reads
them: the interpreter's lock is released meanwhile.
"""

from collections.abc import Sequence
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CostQuantile",
    "CrossSelection",
    "ElementLedger",
    "Ledger",
    "Threshold",
    "UnitSelection",
    "__version__",
    "element_mask",
    "element_threshold",
    "linear_schedule",
    "nm_mask",
    "removal_target",
    "select_rows_columns",
    "select_units",
    "version",
]

__version__: Final[str]

def version() -> str:
    """Version of the compiled core."""

# --- Rows and columns -----------------------------------------------------------------------------

@final
class CrossSelection:
    """Rows and columns that stay and go.

    Attributes:
        keep_rows: for each layer bool ``[R]``, False for rows that are dead or go now.
        keep_columns: for each layer bool ``[C]``, False for columns that are dead or go now.
        removed: parameters removed, ``n_r*C + n_c*R - n_r*n_c`` a layer, dead ones included.
        total: parameters of all layers.
        threshold: the largest cost that went; ``-inf`` if nothing went.
        units_removed: rows and columns that go now, dead ones not counted.
    """

    @property
    def keep_rows(self) -> list[NDArray[np.bool_]]: ...
    @property
    def keep_columns(self) -> list[NDArray[np.bool_]]: ...
    @property
    def removed(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def units_removed(self) -> int: ...

def select_rows_columns(
    row_costs: Sequence[NDArray[np.float64]],
    column_costs: Sequence[NDArray[np.float64]],
    alive_rows: Sequence[NDArray[np.bool_]],
    alive_columns: Sequence[NDArray[np.bool_]],
    target: int,
    *,
    rows: bool = True,
    columns: bool = True,
) -> CrossSelection:
    """Remove the cheapest rows and columns of all layers until `target` parameters are gone.

    Layer ``l`` is a matrix of ``R = len(row_costs[l])`` rows and ``C = len(column_costs[l])``
    columns, either of which may be 0. Expected time O(n), memory O(n) for n rows and columns.

    Args:
        row_costs: for each layer float64 ``[R]``.
        column_costs: for each layer float64 ``[C]``.
        alive_rows: for each layer bool ``[R]``; False counts as removed already.
        alive_columns: for each layer bool ``[C]``; False counts as removed already.
        target: parameters to be removed in total.
        rows: rows may go. If False their costs are not read; dead rows still count.
        columns: columns may go, likewise.

    Raises:
        NonFiniteCostError: a candidate's cost is NaN or infinite (kind ``"row"`` or ``"column"``).
        TargetError: `target` exceeds what can go.
        SelectionError: lists or arrays that do not fit each other, or of another dtype.
    """

# --- Independent units ----------------------------------------------------------------------------

@final
class UnitSelection:
    """Independent units that stay and go.

    Attributes:
        keep: for each layer bool ``[U]``, False for units that are dead or go now.
        removed: parameters removed, dead units and bonuses included.
        threshold: the largest score that went (cost, or cost per parameter); ``-inf`` if nothing
            went.
        units_removed: units that go now, dead ones not counted.
    """

    @property
    def keep(self) -> list[NDArray[np.bool_]]: ...
    @property
    def removed(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def units_removed(self) -> int: ...

def select_units(
    costs: Sequence[NDArray[np.float64]],
    sizes: Sequence[NDArray[np.uint64]],
    alive: Sequence[NDArray[np.bool_]],
    target: int,
    *,
    per_parameter: bool = False,
    bonus: Sequence[int] | None = None,
) -> UnitSelection:
    """Remove the cheapest units of all layers until `target` parameters are gone.

    Expected time O(n), memory O(n) for n units.

    Args:
        costs: for each layer float64 ``[U]``.
        sizes: for each layer uint64 ``[U]``: the parameters that each unit frees.
        alive: for each layer bool ``[U]``; a dead unit counts as removed with its size.
        target: parameters to be removed in total.
        per_parameter: rank by cost divided by size (in float64) instead of cost.
        bonus: for each layer the parameters that are freed in addition when no unit of it is left,
            as a key/value head goes with the last of its query heads. They count towards the
            target, but not in the ranking; a layer without alive units has lost them already.
            None: no layer has any.

    Raises:
        NonFiniteCostError: a candidate's cost is NaN or infinite (kind ``"unit"``).
        TargetError: `target` exceeds what can go.
        SelectionError: lists or arrays that do not fit each other, or of another dtype; an alive
            unit of size 0 with `per_parameter` or in a layer with a bonus; sizes and bonuses that
            together do not fit 64 bits.
    """

# --- Single elements ------------------------------------------------------------------------------

@final
class Threshold:
    """Where a stream of costs is cut so that exactly ``rank`` of them go.

    Everything below `cost` goes, and of the elements equal to it the first `ties` in the order of
    layer and index. ``below + ties`` is the rank.

    Attributes:
        cost: the rank-th smallest cost; ``-inf`` for rank 0.
        below: number of elements strictly below `cost`.
        ties: how many of the elements equal to `cost` go.
        count: number of (alive) elements seen.
    """

    def __new__(cls, cost: float, below: int, ties: int, count: int) -> Threshold: ...
    @property
    def cost(self) -> float: ...
    @property
    def below(self) -> int: ...
    @property
    def ties(self) -> int: ...
    @property
    def count(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class CostQuantile:
    """The exact `rank`-th smallest cost of a stream that never lies in memory as a whole.

    Feed every layer to `update`, call `finish_pass`, and again from the first layer until it
    returns True: two passes for float32, two to four for float64. Needs a few megabytes, whatever
    the length of the stream. The costs must be the same in every pass.

    An error in `update` drops the pass under way: go on by feeding it again from its first layer.

    Args:
        rank: how many elements are to go; 0 is allowed.
    """

    def __new__(cls, rank: int) -> CostQuantile: ...
    def update(self, layer: int, costs: NDArray[Any], alive: NDArray[np.bool_] | None = None) -> None:
        """Feed one layer's costs in the current pass.

        Args:
            layer: the layer's number, for error messages.
            costs: float32 or float64 of any shape; one dtype throughout. Copied if not contiguous.
            alive: bool of the same shape; dead elements are not counted. None: all are alive.

        Raises:
            NonFiniteCostError: an alive cost is NaN or infinite (kind ``"element"``, row-major
                index).
            SelectionError: another dtype, a mask that does not fit, or the threshold is known.
        """

    def finish_pass(self) -> bool:
        """End the current pass; True when the threshold is known.

        Raises:
            TargetError: `rank` exceeds the number of alive elements.
            SelectionError: this pass did not stream the elements of the first.
        """

    @property
    def passes(self) -> int:
        """Passes done so far."""

    @property
    def result(self) -> Threshold:
        """The threshold. SelectionError as long as it is not known."""

def element_threshold(
    costs: Sequence[NDArray[Any]],
    rank: int,
    alive: Sequence[NDArray[np.bool_]] | None = None,
) -> Threshold:
    """Cut the costs of all layers so that exactly `rank` elements go.

    `CostQuantile` over arrays that are all at hand; same arguments and errors.
    """

def element_mask(
    layer: int,
    costs: NDArray[Any],
    threshold: Threshold,
    ties_left: int,
    alive: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.bool_], int]:
    """Keep mask of one layer under a threshold.

    Layers are called in order, starting with ``ties_left = threshold.ties`` and handing on what
    each call returns; nothing else is remembered, so a run can stop and go on between layers.

    Args:
        layer: the layer's number, for error messages.
        costs: float32 or float64 of any shape.
        threshold: where to cut.
        ties_left: how many elements equal to the threshold still go, in row-major order.
        alive: bool of the same shape; False stays False in the result. None: all are alive.

    Returns:
        The keep mask in the shape of `costs`, and what is left of `ties_left`.

    Raises:
        NonFiniteCostError: an alive cost is NaN or infinite (kind ``"element"``).
        SelectionError: another dtype, or a mask that does not fit.
    """

def nm_mask(
    costs: NDArray[Any],
    keep: int,
    group: int,
    *,
    columns: int | None = None,
) -> NDArray[np.bool_]:
    """Keep mask with exactly `keep` of every `group` consecutive columns.

    Groups start at column 0 of each row. The largest costs stay; among equal ones the lower index
    goes first. A last group of fewer than `group` columns keeps at most `keep`.

    Args:
        costs: float32 or float64 ``[R, C]``.
        keep: how many of a group stay, ``1 <= keep < group``.
        group: columns of a group.
        columns: prune only the first `columns` columns; the rest (the bias) stays, its costs are
            not looked at. None: all.

    Returns:
        bool ``[R, C]``.

    Raises:
        NonFiniteCostError: a cost is NaN or infinite (layer 0, kind ``"element"``, index in the
            ``[R, C]`` array, row-major).
        SelectionError: another dtype or shape, or a pattern that makes no sense.
    """

# --- Targets and books ----------------------------------------------------------------------------

def removal_target(total: int, sparsity: float) -> int:
    """Parameters that must go so that at least the part `sparsity` of `total` is gone.

    ``ceil(total * sparsity)``, exact for the decimal number (of at most 12 places) that the float
    was written as: 0.3 of 10 is 3.

    Raises:
        SelectionError: unless ``0 <= sparsity < 1``.
    """

def linear_schedule(total: int, target: int, shots: int) -> list[int]:
    """Parameters removed in total after each of `shots` equal steps: ``ceil(target * t / shots)``.

    Raises:
        TargetError: `target` exceeds `total`.
        SelectionError: `shots` is not between 1 and a million.
    """

@final
class Ledger:
    """Books of the rows and columns that are gone, over all shots.

    Args:
        shapes: rows and columns ``(R, C)`` of each layer.
    """

    def __new__(cls, shapes: Sequence[tuple[int, int]]) -> Ledger: ...
    def commit(
        self,
        keep_rows: Sequence[NDArray[np.bool_]],
        keep_columns: Sequence[NDArray[np.bool_]],
    ) -> int:
        """Book one shot: what stands after it, bool ``[R]`` and ``[C]`` a layer.

        Returns:
            The parameters that the shot newly removed.

        Raises:
            SelectionError: masks that do not fit, or something that was removed in an earlier shot
                is kept again. Nothing is booked then.
        """

    @property
    def removed(self) -> int:
        """Parameters removed so far."""

    @property
    def total(self) -> int:
        """Parameters of all layers, removed ones included."""

    @property
    def sparsity(self) -> float:
        """Removed part of the total."""

    @property
    def shots(self) -> int:
        """Number of shots booked."""

    @property
    def history(self) -> list[int]:
        """Parameters removed in total after each shot."""

    def layer_removed(self, layer: int) -> int:
        """Parameters removed from one layer."""

    def keep_rows(self, layer: int) -> NDArray[np.bool_]:
        """Copy of one layer's row mask ``[R]``: False for rows that are gone."""

    def keep_columns(self, layer: int) -> NDArray[np.bool_]:
        """Copy of one layer's column mask ``[C]``: False for columns that are gone."""

    def to_bytes(self) -> bytes:
        """The ledger as versioned, checksummed bytes."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Ledger:
        """Read what `to_bytes` wrote.

        Raises:
            SelectionError: the bytes are damaged, cut, of an `ElementLedger`, or no ledger at all.
        """

    def __eq__(self, other: object, /) -> bool: ...

@final
class ElementLedger:
    """Books of the single weights that are gone, over all shots.

    The masks stand in the weights themselves, so only counts are kept. A shot books every layer
    once, in any order, and is closed by `commit`; which elements they are is not remembered, only
    that a layer never has fewer removed than before. Equality and bytes are those of the closed
    shots: what is staged for the shot in progress does not show.

    Args:
        sizes: number of parameters of each layer.
    """

    def __new__(cls, sizes: Sequence[int]) -> ElementLedger: ...
    def book(self, layer: int, keep: NDArray[np.bool_]) -> None:
        """Stage one layer for the shot in progress.

        Args:
            layer: the layer's number.
            keep: what stands after the shot, bool of any shape with as many elements as the layer
                has parameters. Copied if not contiguous; not kept.

        Raises:
            SelectionError: a mask that does not fit, or the shot has booked the layer already.
                What is staged stays then.
        """

    def commit(self) -> int:
        """Close the shot in progress.

        Returns:
            The parameters that the shot newly removed.

        Raises:
            SelectionError: a layer was not booked, or has fewer removed than after an earlier
                shot. Nothing is booked then, and what was staged is dropped.
        """

    @property
    def removed(self) -> int:
        """Parameters removed so far."""

    @property
    def total(self) -> int:
        """Parameters of all layers, removed ones included."""

    @property
    def sparsity(self) -> float:
        """Removed part of the total."""

    @property
    def shots(self) -> int:
        """Number of shots closed."""

    @property
    def history(self) -> list[int]:
        """Parameters removed in total after each shot."""

    def layer_removed(self, layer: int) -> int:
        """Parameters removed from one layer."""

    def to_bytes(self) -> bytes:
        """The closed shots as versioned, checksummed bytes."""

    @classmethod
    def from_bytes(cls, data: bytes) -> ElementLedger:
        """Read what `to_bytes` wrote.

        Raises:
            SelectionError: the bytes are damaged, cut, of a `Ledger`, or no ledger at all.
        """

    def __eq__(self, other: object, /) -> bool: ...
