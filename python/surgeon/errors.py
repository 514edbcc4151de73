"""The one tree of exceptions.

Every error carries what a person needs to act: the layer's name where there is one, the
index inside it, and one sentence. The command line prints that sentence and exits with
``exit_code``: 2 for wrong use (change something and call again), 1 for a failed run.

The Rust extension raises the selection errors below by importing this module, so a user
catches one and the same class wherever an error arose.
"""

from __future__ import annotations


class SurgeonError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: int = 1


class UsageError(SurgeonError):
    """The caller asked for something that cannot be done as asked."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """An option has a bad value, or two options contradict each other."""


class DataError(UsageError, ValueError):
    """Calibration or test text is missing, empty, too short or unreadable."""


class ModelError(UsageError):
    """The model is missing, corrupt or of a family that is not supported."""


class NoTokenizerError(ModelError):
    """A checkpoint folder without a tokenizer, which is fine where all data are tokens."""


class OutputError(UsageError):
    """The output folder cannot be used: it holds files, is locked or is not writable."""


class ResumeError(UsageError):
    """There is nothing to resume, or it belongs to another model, data or configuration."""


class NumericsError(SurgeonError, ArithmeticError):
    """Numbers that no result may be built on.

    Attributes:
        layer: full module name, e.g. ``model.layers.3.mlp.up_proj``; None if not of one layer.
        index: position inside the layer, or of the calibration window; None if not known.
    """

    def __init__(self, message: str, *, layer: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.layer = layer
        self.index = index


class NonFiniteError(NumericsError):
    """NaN or infinity in activations, gradients, factors, weights or losses."""


class ZeroCurvatureError(NumericsError):
    """A layer that was never reached, or curvature that is zero where it cannot be."""


class SingularFactorError(NumericsError):
    """A curvature factor stayed indefinite after the last step of the damping ladder."""


class PatternError(NumericsError):
    """A layer does not hold the N:M pattern that it was pruned to."""


class SelectionError(SurgeonError, ValueError):
    """Input that the selection core refuses: shapes, dtypes or counts that do not fit."""


class NonFiniteCostError(SelectionError):
    """A cost is NaN or infinite.

    Attributes:
        layer: index of the layer in the order given to the core.
        kind: ``"row"``, ``"column"``, ``"unit"`` or ``"element"``.
        index: position of the cost inside that layer (row-major for elements).
        value: the offending cost.
    """

    def __init__(self, layer: int, kind: str, index: int, value: float) -> None:
        super().__init__(f"cost of {kind} {index} of layer {layer} is {value}: costs must be finite")
        self.layer = layer
        self.kind = kind
        self.index = index
        self.value = value


class TargetError(SelectionError):
    """More is to be removed than there is.

    Attributes:
        requested: parameters to remove.
        available: parameters that can be removed.
    """

    def __init__(self, requested: int, available: int) -> None:
        super().__init__(f"{requested} parameters are to be removed but only {available} can be: lower the sparsity")
        self.requested = requested
        self.available = available
