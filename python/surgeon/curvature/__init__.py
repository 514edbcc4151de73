"""Kinds of curvature: one file each, found by name."""

from surgeon.curvature.base import CurvatureFactors, Estimator, LayerFactors, estimator_for, register
from surgeon.curvature.identity import identity
from surgeon.curvature.kfac import kfac

__all__ = [
    "CurvatureFactors",
    "Estimator",
    "LayerFactors",
    "estimator_for",
    "identity",
    "kfac",
    "register",
]
