"""Every method on every structure, on one model and the same windows: the figures of the README's table.

    python benches/method_table.py models/smollm2-135m benches/results/smollm2-methods.json

Goes on where it was stopped: rows that the result file holds already are not run again (`--rows` picks
some). Structured rows prune in three shots to 30 % and are measured after each; `--heal` then fits
adapters on every structured result, from the very weights of the table. The curvature of the unpruned
model is the same for all runs of one kind and is estimated once.
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
from surgeon.curvature import CurvatureFactors, estimator_for
from surgeon.evaluation import evaluate_windows
from surgeon.heal import HealSettings, heal
from surgeon.models import LoadedModel, load_model, load_tokenizer, match_layers
from surgeon.progress import Observer, PlainProgress

STRUCTURED = ("rows-columns", "neurons,heads")
METHODS = ("magnitude", "l-obd", "k-obd", "surgeon")
LAYERWISE = ("wanda", "sparsegpt")
WINDOWS = {"samples": 32, "sequence_length": 512, "test_samples": 40, "seed": 0, "batch_tokens": 512}

_dense: dict[str, CurvatureFactors] = {}


def rows() -> dict[str, dict[str, Any]]:
    """Name → settings of every run."""
    found: dict[str, dict[str, Any]] = {}
    for structure in STRUCTURED:
        for method in METHODS:
            found[f"{structure} {method}"] = {"structure": structure, "method": method, "sparsity": 0.3, "shots": 3}
    for structure in ("weights", "2:4"):
        for method in (*METHODS, *LAYERWISE):
            found[f"{structure} {method}"] = {"structure": structure, "method": method, "sparsity": 0.5, "shots": 1}
        found[f"{structure} surgeon 5 shots"] = {
            "structure": structure,
            "method": "surgeon",
            "sparsity": 0.5,
            "shots": 5,
        }
    return found


def remember_dense(session: shots.Session) -> None:
    """Let a session take its first curvature from an earlier run's."""

    def lookup(kind: str) -> Any:
        def estimate(*arguments: Any, **options: Any) -> CurvatureFactors:
            if session.state.shots:
                return estimator_for(kind)(*arguments, **options)
            if kind not in _dense:
                _dense.clear()  # one kind at a time: a gigabyte each
                _dense[kind] = estimator_for(kind)(*arguments, **options)
            return _dense[kind]

        return estimate

    shots.estimator_for = lookup  # type: ignore[assignment]


class Keeper(Observer):
    """Keeps the weights after every shot, to heal them later."""

    def __init__(self, session: shots.Session, every: bool) -> None:
        self.session = session
        self.every = every
        self.weights: list[list[torch.Tensor]] = []

    def shot_done(self, record: dict[str, Any]) -> None:
        if self.every:
            self.weights.append([layer.read(torch.float32) for layer in self.session.layers])


def run(loaded: LoadedModel, config: PruneConfig, dense: float | None, healing: HealSettings | None) -> dict[str, Any]:
    """One row: prune a fresh model, measure it after every shot, heal each result if asked to."""
    matched = match_layers(loaded.model)
    tokenizer = load_tokenizer(config.model)
    calibration = runner.calibration_set(config, loaded, tokenizer, 512)
    test = runner.test_set(config.test_data, loaded, tokenizer, 512, config.test_samples)
    observer = PlainProgress(Console(stderr=True))
    session = shots.Session(loaded, matched, calibration=calibration, test=test, config=config, observer=observer)
    session.state.dense_perplexity = dense
    remember_dense(session)
    keeper = Keeper(session, every=healing is not None)
    session._observer.shot_done = keeper.shot_done  # type: ignore[method-assign]
    state = session.run()
    value: dict[str, Any] = {
        "config": {**config.to_dict(), "model": Path(config.model).name},
        "dense": state.dense_perplexity,
        "protocol": report.protocol(config, calibration, test),
        "shots": [dataclasses.asdict(record) for record in state.shots],
        "zeros": sum(int((layer.read(torch.float32) == 0).sum()) for layer in matched.layers) / matched.parameters,
        "healed": [],
    }
    for weights in keeper.weights if healing is not None else []:
        for layer, W_RC in zip(matched.layers, weights, strict=True):
            layer.write(W_RC)
        begun = time.perf_counter()
        record = heal(
            loaded.model, matched.layers, calibration, settings=healing, batch_tokens=config.batch_tokens
        )
        seconds = time.perf_counter() - begun
        changed = sum(
            int(((W_RC == 0) != (layer.read(torch.float32) == 0)).sum())
            for layer, W_RC in zip(matched.layers, weights, strict=True)
        )
        perplexity = evaluate_windows(loaded.model, test, batch_tokens=config.batch_tokens).perplexity
        value["healed"].append(
            {**dataclasses.asdict(record), "perplexity": perplexity, "zeros_changed": changed, "seconds": seconds}
        )
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", help="only rows whose name holds one of these, separated by |")
    parser.add_argument("--heal", type=float, metavar="EPOCHS", help="heal the structured results too")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"command": "python benches/method_table.py MODEL RESULT", "rows": {}}
    if arguments.result.exists():
        found = json.loads(arguments.result.read_text(encoding="utf-8"))
    dense = next((row["dense"] for row in found["rows"].values()), None)
    healing = None if arguments.heal is None else HealSettings(epochs=arguments.heal)
    for name, settings in rows().items():
        wanted = arguments.rows is None or any(part in name for part in arguments.rows.split("|"))
        old = found["rows"].get(name)
        due = old is None or (healing is not None and settings["structure"] in STRUCTURED and not old["healed"])
        if not wanted or not due:
            continue
        config = PruneConfig(model=arguments.model, **settings, **WINDOWS)
        loaded = load_model(arguments.model, device=torch.device("cpu"), precision=torch.float32)
        begun = time.perf_counter()
        row = run(loaded, config, dense, healing if settings["structure"] in STRUCTURED else None)
        row["seconds"] = time.perf_counter() - begun
        row["environment"] = report.environment(torch.device("cpu"))
        row["commit"] = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dense = row["dense"]
        found["rows"][name] = row
        arguments.result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        measured = "  ".join(f"{shot['sparsity']:.1%} {shot['perplexity']:.3f}" for shot in row["shots"])
        healed = "  ".join(f"{one['perplexity']:.3f}" for one in row["healed"])
        print(f"{name}: {measured}" + (f"  healed {healed}" if healed else ""), flush=True)


if __name__ == "__main__":
    main()
