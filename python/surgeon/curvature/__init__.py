"""Kinds of curvature: one file each, found by name."""

from surgeon.curvature.activations import activations
from surgeon.curvature.base import (
    CurvatureFactors,
    CurvatureOptions,
    Estimator,
    LayerFactors,
    estimator_for,
    register,
)
from surgeon.curvature.identity import identity
from surgeon.curvature.kfac import kfac
from surgeon.curvature.kron import kron

__all__ = [
    "CurvatureFactors",
    "CurvatureOptions",
    "Estimator",
    "LayerFactors",
    "activations",
    "estimator_for",
    "identity",
    "kfac",
    "kron",
    "register",
]
