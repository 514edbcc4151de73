"""``surgeon.json``: what was done, under which protocol, and what came of it."""

from __future__ import annotations

import dataclasses
import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from surgeon.progress import finite
from surgeon.schedule import ElementLedger

if TYPE_CHECKING:
    from pathlib import Path

    from surgeon.config import PruneConfig
    from surgeon.data import Windows
    from surgeon.models import Matched
    from surgeon.session import RunState

SCHEMA_VERSION = 1


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device."""
    packages = {
        name: metadata.version(name)
        for name in ("llm-surgeon", "torch", "transformers", "numpy", "safetensors")
        if _installed(name)
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        **packages,
    }


def processor() -> str:
    """The processor's name as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def protocol(config: PruneConfig, calibration: Windows | None, test: Windows | None) -> dict[str, Any]:
    """How the numbers were made; print it beside them."""
    return {
        "sparsity": "removed / total over weights and biases of the decoder blocks' linear layers",
        "perplexity": "exp of the mean over windows of each window's mean next-token loss, windows side by side",
        "sequence_length": config.sequence_length,
        "calibration": _describe(calibration),
        "test": _describe(test),
    }


def _describe(windows: Windows | None) -> dict[str, Any] | None:
    if windows is None:
        return None
    return {
        "source": windows.source,
        "windows": len(windows),
        "length": windows.length,
        "digest": windows.digest,
    }


def build(
    *,
    config: PruneConfig,
    matched: Matched,
    state: RunState,
    protocol: dict[str, Any],
    environment: dict[str, Any],
    final: dict[str, Any],
) -> dict[str, Any]:
    """The whole report as plain values; non-finite numbers become null."""
    layers = []
    for index, layer in enumerate(matched.layers):
        kept = layer.read(layer.weight.dtype) != 0
        layers.append(
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "sparsity": _removed(state, index, kept) / max(layer.parameters, 1),
                "kept_rows": int(kept.any(1).sum()),
                "kept_columns": int(kept.any(0).sum()),
            }
        )
    value = {
        "schema_version": SCHEMA_VERSION,
        "config": config.to_dict(),
        "environment": environment,
        "protocol": protocol,
        "family": matched.adapter.family,
        "skipped": list(matched.skipped),
        "dense": {"perplexity": state.dense_perplexity},
        "shots": [dataclasses.asdict(record) for record in state.shots],
        "layers": layers,
        "final": final,
    }
    cleaned = finite(value)
    assert isinstance(cleaned, dict)
    return cleaned


def _removed(state: RunState, index: int, kept: torch.Tensor) -> int:
    """Parameters gone from a layer; masks of single weights are in the weights as they are written."""
    if isinstance(state.ledger, ElementLedger):
        return kept.numel() - int(kept.sum())
    return state.ledger.layer_removed(index)


def write(value: dict[str, Any], folder: Path) -> None:
    """Write ``surgeon.json`` into a folder."""
    (folder / "surgeon.json").write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
