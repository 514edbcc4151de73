"""Structures and methods: which units a run removes, and by which rules.

A *structure* is a family of *units*, the smallest things that can go. This file only names and
parses them, and says which go together; what a unit costs and how it is removed is in
:mod:`surgeon.operations`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from surgeon.errors import ConfigError

MOST_GROUP = 4096
_NM = re.compile(r"^([0-9]+):([0-9]+)$")
_E = TypeVar("_E", bound=StrEnum)


class Kind(StrEnum):
    """What the units of a structure are made of."""

    AXES = "axes"  # whole rows and columns of single layers
    COUPLED = "coupled"  # rows and columns of several layers that only go together
    WEIGHTS = "weights"  # single weights
    GROUPS = "groups"  # N:M groups of consecutive inputs


@dataclass(frozen=True)
class NMPattern:
    """At most ``keep`` non-zero weights in every ``group`` consecutive inputs, written ``keep:group``."""

    keep: int
    group: int

    @property
    def sparsity(self) -> float:
        """Part of the weights that goes where every group is pruned."""
        return (self.group - self.keep) / self.group

    def __str__(self) -> str:
        """As in ``2:4``."""
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Structure:
    """A family of removable units.

    Attributes:
        name: as it is written on the command line.
        kind: what its units are made of.
        parts: ``rows`` and ``columns``, or ``neurons`` and ``heads``: which of them may go.
        pattern: of N:M groups, else None.
    """

    name: str
    kind: Kind
    parts: frozenset[str] = frozenset()
    pattern: NMPattern | None = None

    @property
    def elementwise(self) -> bool:
        """Whether masks are over single weights."""
        return self.kind in {Kind.WEIGHTS, Kind.GROUPS}

    def __str__(self) -> str:
        """The name."""
        return self.name


_NAMED = {
    "rows-columns": Structure("rows-columns", Kind.AXES, frozenset({"rows", "columns"})),
    "rows": Structure("rows", Kind.AXES, frozenset({"rows"})),
    "columns": Structure("columns", Kind.AXES, frozenset({"columns"})),
    "neurons": Structure("neurons", Kind.COUPLED, frozenset({"neurons"})),
    "heads": Structure("heads", Kind.COUPLED, frozenset({"heads"})),
    "neurons,heads": Structure("neurons,heads", Kind.COUPLED, frozenset({"neurons", "heads"})),
    "weights": Structure("weights", Kind.WEIGHTS),
}


class Curvature(StrEnum):
    """Kinds of curvature: how the Fisher of a layer is approximated.

    * ``kfac``: one Kronecker product of the second moments of inputs and output gradients (IAD).
    * ``kron``: the nearest Kronecker product, or sum of them, in Frobenius norm.
    * ``activations``: the second moment of the inputs alone.
    * ``identity``: none; magnitude.
    """

    KFAC = "kfac"
    KRON = "kron"
    ACTIVATIONS = "activations"
    IDENTITY = "identity"


class Update(StrEnum):
    """What happens to the weights that stay.

    * ``joint``: the optimum of the quadratic model for everything removed at once.
    * ``chunked``: single weights only: the paper's solves of at most so many weights at a time.
    * ``none``: nothing.
    """

    JOINT = "joint"
    CHUNKED = "chunked"
    NONE = "none"


class Method(StrEnum):
    """How costs are computed and whether what stays is updated.

    * ``surgeon``: OBS costs by the Kronecker-factored Fisher, exact joint update.
    * ``k-obd``: the same curvature, OBD costs, no update.
    * ``l-obd``: curvature of the inputs alone, OBD costs, no update.
    * ``magnitude``: no curvature, no update; needs no data but the test text.
    * ``sparsegpt``: layer after layer, each to the same sparsity, with its own update.
    * ``wanda``: layer after layer, each row to the same sparsity, no update.
    """

    SURGEON = "surgeon"
    K_OBD = "k-obd"
    L_OBD = "l-obd"
    MAGNITUDE = "magnitude"
    SPARSEGPT = "sparsegpt"
    WANDA = "wanda"

    @property
    def layerwise(self) -> bool:
        """Whether it works through the blocks one after another, without a global selection."""
        return self in {Method.SPARSEGPT, Method.WANDA}

    @property
    def curvatures(self) -> tuple[Curvature, ...]:
        """Kinds of curvature that it may use, the default first."""
        if self in {Method.SURGEON, Method.K_OBD}:
            return (Curvature.KFAC, Curvature.KRON, Curvature.ACTIVATIONS)
        return (Curvature.IDENTITY,) if self is Method.MAGNITUDE else (Curvature.ACTIVATIONS,)

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be run over calibration windows."""
        return self is not Method.MAGNITUDE

    @property
    def updates(self) -> bool:
        """Whether the kept weights may be changed to make up for what went."""
        return self in {Method.SURGEON, Method.SPARSEGPT}


def parse_structure(text: str) -> Structure:
    """Read a structure's name; any ``N:M`` is one.

    Raises:
        ConfigError: it is no structure.
    """
    name = ",".join(part.strip() for part in text.strip().lower().split(","))
    name = "neurons,heads" if name == "heads,neurons" else name
    if name in _NAMED:
        return _NAMED[name]
    match = _NM.match(name)
    if match is None:
        names = ", ".join(_NAMED)
        raise ConfigError(f"unknown structure {text!r}: choose one of {names} or N:M such as 2:4")
    keep, group = int(match.group(1)), int(match.group(2))
    if not 1 <= keep < group <= MOST_GROUP:
        raise ConfigError(f"{text.strip()} is no pattern: N of every M stay, 1 <= N < M <= {MOST_GROUP}")
    return Structure(f"{keep}:{group}", Kind.GROUPS, pattern=NMPattern(keep, group))


def parse_method(text: str) -> Method:
    """Read a method's name.

    Raises:
        ConfigError: the name is not one of :class:`Method`.
    """
    return _parse(Method, "method", text)


def parse_curvature(text: str) -> Curvature:
    """Read the name of a kind of curvature.

    Raises:
        ConfigError: the name is not one of :class:`Curvature`.
    """
    return _parse(Curvature, "curvature", text)


def parse_update(text: str) -> Update:
    """Read the name of an update.

    Raises:
        ConfigError: the name is not one of :class:`Update`.
    """
    return _parse(Update, "update", text)


def _parse(values: type[_E], what: str, text: str) -> _E:
    try:
        return values(text.strip().lower())
    except ValueError:
        raise ConfigError(f"unknown {what} {text!r}: choose one of {', '.join(values)}") from None


def check_together(structure: Structure, method: Method, curvature: Curvature, update: Update, terms: int) -> None:
    """Refuse what has no meaning together.

    Raises:
        ConfigError: in one line, with what to choose instead.
    """
    if method.layerwise and not structure.elementwise:
        raise ConfigError(f"{method} prunes single weights: give --structure weights or N:M, or another --method")
    if curvature not in method.curvatures:
        choice = " or ".join(method.curvatures)
        raise ConfigError(
            f"{method} uses {choice} curvature, not {curvature}: leave --curvature out or change --method"
        )
    if update is not Update.NONE and not method.updates:
        raise ConfigError(f"{method} updates nothing: leave --update out, or use --method surgeon")
    if method is Method.SPARSEGPT and update is not Update.JOINT:
        raise ConfigError("sparsegpt has an update of its own: leave --update out")
    if update is Update.CHUNKED and not structure.elementwise:
        raise ConfigError(f"--update chunked is for weights and N:M; {structure} has an exact update: use joint")
    if terms > 1 and curvature is not Curvature.KRON:
        raise ConfigError(f"{curvature} curvature has one Kronecker term: --kronecker-terms is for --curvature kron")
    if terms > 2 and method is Method.SURGEON:
        raise ConfigError("surgeon's costs know one or two Kronecker terms: use --kronecker-terms 2, or --method k-obd")
    if terms > 1 and update is Update.CHUNKED:
        raise ConfigError("--update chunked knows one Kronecker term: use joint")
    if terms > 1 and "heads" in structure.parts:
        raise ConfigError("heads need one Kronecker term: leave --kronecker-terms out")
