"""Every method on every structure, on one model and the same windows: the figures of the README's table.

    python benches/method_table.py models/smollm2-135m benches/results/smollm2-methods.json

Goes on where it was stopped: rows that the result file holds are not run again, and `--rows` picks some.
With `--heal EPOCHS` adapters are then fitted on every structured result of one shot, from the very
weights of the table. The unpruned model's curvature is the same for all first shots; it is estimated
once, and kept between calls where `--cache FILE` is given. L-OBD's inputs' moments are K-FAC's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from surgeon import PruneConfig, report, runner
from surgeon import session as shots
from surgeon.curvature import CurvatureFactors, LayerFactors, estimator_for
from surgeon.evaluation import evaluate_windows
from surgeon.heal import HealSettings, heal
from surgeon.models import load_model, load_tokenizer, match_layers
from surgeon.progress import PlainProgress, finite

STRUCTURED = ("rows-columns", "neurons,heads")
METHODS = ("surgeon", "k-obd", "l-obd", "magnitude")
LAYERWISE = ("sparsegpt", "wanda")
WINDOWS = {"samples": 32, "sequence_length": 512, "test_samples": 40, "seed": 0, "batch_tokens": 512}


def rows() -> dict[str, dict[str, Any]]:
    """Name → settings of every run."""
    found: dict[str, dict[str, Any]] = {}
    for structure in ("weights", "2:4"):
        for method in (*METHODS, *LAYERWISE):
            found[f"{structure} {method} 50%"] = {"structure": structure, "method": method, "sparsity": 0.5, "shots": 1}
    for structure in STRUCTURED:
        for method in METHODS:
            for sparsity in (0.1, 0.2, 0.3):
                found[f"{structure} {method} {sparsity:.0%}"] = {
                    "structure": structure,
                    "method": method,
                    "sparsity": sparsity,
                    "shots": 1,
                }
    for structure, sparsity in (("neurons,heads", 0.3), ("weights", 0.5), ("2:4", 0.5)):
        settings = {"structure": structure, "method": "surgeon", "sparsity": sparsity, "shots": 5}
        found[f"{structure} surgeon {sparsity:.0%} 5 shots"] = settings
    return found


class DenseCurvature:
    """The unpruned model's curvature: estimated by the first who asks, kept for the others."""

    def __init__(self, cache: Path | None) -> None:
        self._cache = cache
        self._factors: CurvatureFactors | None = None

    def attach(self, session: shots.Session) -> None:
        """Let a session take its first shot's curvature from here."""

        def lookup(kind: str) -> Any:
            def estimate(*arguments: Any, **options: Any) -> CurvatureFactors:
                if session.state.shots or kind == "identity":
                    return estimator_for(kind)(*arguments, **options)
                found = self._kfac(*arguments, **options)
                if kind == "activations":
                    layers = [LayerFactors(f.A_CC, None, f.a_key) for f in found.layers]
                    return dataclasses.replace(found, layers=layers)
                return found

            return estimate

        shots.estimator_for = lookup  # type: ignore[assignment]

    def _kfac(self, *arguments: Any, **options: Any) -> CurvatureFactors:
        if self._factors is None and self._cache is not None and self._cache.exists():
            self._factors = torch.load(self._cache, weights_only=False)
        if self._factors is None:
            self._factors = estimator_for("kfac")(*arguments, **options)
            if self._cache is not None:
                torch.save(self._factors, self._cache)
        return self._factors


def run(config: PruneConfig, dense: float | None, curvature: DenseCurvature) -> tuple[dict[str, Any], Any]:
    """One row: prune a fresh model and measure it after every shot; also a function that heals it."""
    loaded = load_model(config.model, device=torch.device("cpu"), precision=torch.float32)
    matched = match_layers(loaded.model)
    tokenizer = load_tokenizer(config.model)
    calibration = runner.calibration_set(config, loaded, tokenizer, 512)
    test = runner.test_set(config.test_data, loaded, tokenizer, 512, config.test_samples)
    observer = PlainProgress(Console(stderr=True))
    session = shots.Session(
        loaded,
        matched,
        calibration=calibration if config.needs_data else None,
        test=test,
        config=config,
        observer=observer,
    )
    session.state.dense_perplexity = dense
    curvature.attach(session)
    # The table has no column for the calibration loss, a pass of its own after the last shot.
    session._calibration_loss = lambda: float("nan")  # type: ignore[method-assign]
    begun = time.perf_counter()
    state = session.run()
    value: dict[str, Any] = {
        "config": {**config.to_dict(), "model": Path(config.model).name},
        "dense": state.dense_perplexity,
        "protocol": report.protocol(config, calibration, test),
        "shots": [dataclasses.asdict(record) for record in state.shots],
        "seconds": time.perf_counter() - begun,
        "healed": None,
    }

    def healed(settings: HealSettings) -> dict[str, Any]:
        before = [layer.read(torch.float32) == 0 for layer in matched.layers]
        begun = time.perf_counter()
        record = heal(
            loaded.model, matched.layers, calibration, settings=settings, batch_tokens=512, keeps=session._keep
        )
        seconds = time.perf_counter() - begun
        pairs = zip(before, matched.layers, strict=True)
        changed = sum(int((zeros != (layer.read(torch.float32) == 0)).sum()) for zeros, layer in pairs)
        perplexity = evaluate_windows(loaded.model, test, batch_tokens=512).perplexity
        return {
            "settings": dataclasses.asdict(settings),
            **dataclasses.asdict(record),
            "perplexity": perplexity,
            "zeros_changed": changed,
            "seconds": seconds,
        }

    return value, healed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", help="only rows whose name holds one of these, separated by |")
    parser.add_argument("--heal", type=float, metavar="EPOCHS", help="heal the structured results of one shot too")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep the unpruned model's curvature here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"command": "python benches/method_table.py MODEL RESULT --heal 1", "rows": {}}
    if arguments.result.exists():
        found = json.loads(arguments.result.read_text(encoding="utf-8"))
    curvature = DenseCurvature(arguments.cache)
    for name, settings in rows().items():
        heals = arguments.heal is not None and settings["structure"] in STRUCTURED and settings["shots"] == 1
        old = found["rows"].get(name)
        done = old is not None and (old["healed"] is not None or not heals)
        if done or (arguments.rows is not None and not any(part in name for part in arguments.rows.split("|"))):
            continue
        dense = next((row["dense"] for row in found["rows"].values()), None)
        config = PruneConfig(model=arguments.model, **settings, **WINDOWS)
        row, healed = run(config, dense, curvature)
        if heals:
            row["healed"] = healed(HealSettings(epochs=arguments.heal))
        row["environment"] = report.environment(torch.device("cpu"))
        row["commit"] = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        found["rows"][name] = row
        arguments.result.write_text(json.dumps(finite(found), indent=1) + "\n", encoding="utf-8")
        measured = "  ".join(f"{shot['sparsity']:.1%} {shot['perplexity']:.3f}" for shot in row["shots"])
        print(f"{name}: {measured}" + (f"  healed {row['healed']['perplexity']:.3f}" if heals else ""), flush=True)


if __name__ == "__main__":
    main()
