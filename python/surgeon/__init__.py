"""Prune pretrained transformers by Kronecker-factored curvature of the training loss.

``import surgeon`` is cheap: torch and transformers load when something of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgeon.errors import SurgeonError

if TYPE_CHECKING:
    from surgeon.config import PruneConfig
    from surgeon.evaluation import Evaluation
    from surgeon.progress import Observer
    from surgeon.runner import PruneResult, evaluate, prune
    from surgeon.structures import Method, Structure

_LAZY = {
    "Evaluation": "surgeon.evaluation",
    "Method": "surgeon.structures",
    "Observer": "surgeon.progress",
    "PruneConfig": "surgeon.config",
    "PruneResult": "surgeon.runner",
    "Structure": "surgeon.structures",
    "evaluate": "surgeon.runner",
    "prune": "surgeon.runner",
}

__all__ = [
    "Evaluation",
    "Method",
    "Observer",
    "PruneConfig",
    "PruneResult",
    "Structure",
    "SurgeonError",
    "__version__",
    "evaluate",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("surgeon._core").__version__
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
