"""What a structure has to be able to do in one shot.

A shot measures every layer, selects over all of them at once, and then changes every layer. The
object lives for one shot; the session feeds it weights and factors and never looks inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from surgeon.curvature import LayerFactors
    from surgeon.schedule import Books


@dataclass(frozen=True)
class DampingEvent:
    """A factor needed more damping than was asked for, or a second Kronecker term had to be shrunk.

    Attributes:
        layer: layer name.
        factor: ``"A"`` or ``"G"``, or ``"second term"``.
        asked: relative damping asked for; 1 for a second term.
        used: relative damping that made the factor positive definite, or what the second term was
            multiplied by.
        step: step of the ladder.
    """

    layer: str
    factor: str
    asked: float
    used: float
    step: int


@dataclass(frozen=True)
class Selected:
    """What a selection says about itself.

    Attributes:
        removed: parameters gone in total, dead units included.
        threshold: largest cost that went; ``-inf`` if none did.
        units: units newly removed.
    """

    removed: int
    threshold: float
    units: int


@dataclass(frozen=True)
class Applied:
    """A layer after its shot.

    Attributes:
        W_RC: new weights, zero where removed.
        predicted_increase: what the quadratic model says that the loss grows by, nats a token.
    """

    W_RC: Tensor
    predicted_increase: float


class ShotOperations(ABC):
    """One structure's operations in one shot."""

    @abstractmethod
    def measure(self, index: int, W_RC: Tensor, factors: LayerFactors) -> None:
        """Compute the costs of a layer's units; called once a layer, in order."""

    @abstractmethod
    def select(self, target: int) -> Selected:
        """Choose what goes, over all measured layers, until ``target`` parameters are gone."""

    @abstractmethod
    def apply(self, index: int, W_RC: Tensor, factors: LayerFactors) -> Applied:
        """Remove a layer's chosen units and update what stays."""

    @abstractmethod
    def commit(self, books: Books) -> None:
        """Enter what went into the books."""

    @property
    @abstractmethod
    def damping_events(self) -> list[DampingEvent]:
        """Every climb of the damping ladder so far."""
