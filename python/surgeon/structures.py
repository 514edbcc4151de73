"""Structures: which units a run removes.

A *structure* is a family of *units*, the smallest things that can go. This file only names and
parses them; what one of them costs and how it is removed is in :mod:`surgeon.operations`.
"""

from __future__ import annotations

from enum import StrEnum

from surgeon.errors import ConfigError


class Structure(StrEnum):
    """Families of removable units inside a linear layer ``W [R, C]``."""

    ROWS_COLUMNS = "rows-columns"
    ROWS = "rows"
    COLUMNS = "columns"

    @property
    def rows(self) -> bool:
        """Whether output rows may go."""
        return self is not Structure.COLUMNS

    @property
    def columns(self) -> bool:
        """Whether input columns (the bias column among them) may go."""
        return self is not Structure.ROWS


class Method(StrEnum):
    """How costs are computed and whether what stays is updated.

    * ``surgeon``: K-FAC curvature, OBS costs, exact joint update (the paper and past it).
    * ``k-obd``: K-FAC curvature, OBD costs, no update.
    * ``magnitude``: identity curvature, no update; needs no data but the test text.
    """

    SURGEON = "surgeon"
    K_OBD = "k-obd"
    MAGNITUDE = "magnitude"

    @property
    def curvature(self) -> str:
        """Kind of curvature that the costs come from."""
        return "identity" if self is Method.MAGNITUDE else "kfac"

    @property
    def needs_data(self) -> bool:
        """Whether the model has to be run over calibration windows."""
        return self is not Method.MAGNITUDE

    @property
    def updates(self) -> bool:
        """Whether the kept weights are changed to make up for what went."""
        return self is Method.SURGEON


def parse_structure(text: str) -> Structure:
    """Read a structure's name.

    Raises:
        ConfigError: the name is not one of :class:`Structure`.
    """
    try:
        return Structure(text.strip().lower())
    except ValueError:
        names = ", ".join(Structure)
        raise ConfigError(f"unknown structure {text!r}: choose one of {names}") from None


def parse_method(text: str) -> Method:
    """Read a method's name.

    Raises:
        ConfigError: the name is not one of :class:`Method`.
    """
    try:
        return Method(text.strip().lower())
    except ValueError:
        names = ", ".join(Method)
        raise ConfigError(f"unknown method {text!r}: choose one of {names}") from None
