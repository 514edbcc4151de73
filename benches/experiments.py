"""Variants of the method, each beside the default at equal removed parameters on the same windows.

    python benches/experiments.py demo benches/results/experiments-demo.json
    python benches/experiments.py models/smollm2-135m FILE --samples 32 --sequence-length 512 --seeds 0

Goes on where it was stopped: rows that the result file holds are not run again, and ``--only`` picks
experiments or rows by parts of their names. What is compared with what is in ``experiments/plan.py``.
A ratio is the variant's test perplexity over the default's, of the same seed: below 1 the variant wins.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

# As on the command line: no bars of the libraries. Read when they are imported.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

from experiments.plan import RUNNERS, Trial, comparisons, trials
from experiments.workbench import Protocol, Workbench
from surgeon import PruneConfig, SurgeonError, report
from surgeon.progress import finite


def run(bench: Workbench, trial: Trial, seed: int, rows: dict[str, Any]) -> tuple[dict[str, Any], PruneConfig]:
    """One row."""
    removed = None if trial.match is None else rows[_row(trial.match, seed)]["sparsity"]
    settings = trial.settings(removed)
    config = bench.config(settings, seed)
    begun = time.perf_counter()
    row: dict[str, Any] = {"config": {**settings, "seed": seed}, "runner": trial.runner}
    try:
        outcome = RUNNERS[trial.runner](bench, config)
        row |= {
            "perplexity": bench.perplexity(),
            "removed": outcome.removed,
            "sparsity": outcome.removed / bench.matched.parameters,
            "predicted": sum(shot["predicted"] or 0.0 for shot in outcome.shots),
            "shots": outcome.shots,
            **outcome.notes,
        }
    except SurgeonError as error:
        row["error"] = str(error)
    row["seconds"] = time.perf_counter() - begun
    return row, config


def summary(rows: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """Every comparison over the seeds that are there."""
    found = []
    for comparison in comparisons():
        names = [(_row(comparison.default.name, seed), _row(comparison.variant.name, seed)) for seed in seeds]
        both = [
            (rows[a], rows[b]) for a, b in names if "perplexity" in rows.get(a, {}) and "perplexity" in rows.get(b, {})
        ]
        if not both:
            continue
        default, variant = ([row["perplexity"] for row in side] for side in zip(*both, strict=True))
        logs = [math.log(b / a) for a, b in zip(default, variant, strict=True)]
        found.append(
            {
                "experiment": comparison.experiment,
                "default": comparison.default.name,
                "variant": comparison.variant.name,
                "sparsity": [[row["sparsity"] for row in pair] for pair in both],
                "default_perplexity": default,
                "variant_perplexity": variant,
                "ratios": [math.exp(value) for value in logs],
                "ratio": math.exp(statistics.fmean(logs)),
                "default_spread": statistics.stdev(map(math.log, default)) if len(default) > 1 else None,
                "verdict": verdict(logs),
            }
        )
    return found


def verdict(logs: list[float]) -> str:
    """Won or lost where all seeds agree and their mean is more than twice its standard error, else noise."""
    if len(logs) < 2:
        return "one seed"
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    agree = all(value < 0 for value in logs) or all(value > 0 for value in logs)
    return ("won" if mean < 0 else "lost") if agree and abs(mean) > 2 * error else "noise"


def _row(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"


def _place(known: list[dict[str, Any]], value: dict[str, Any]) -> int:
    """Where a value is in a list, put there if it is not yet."""
    value = json.loads(json.dumps(value))
    if value not in known:
        known.append(value)
    return known.index(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--only", help="only experiments or rows whose name holds one of these, separated by |")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--test-samples", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--seeds", default="0,1,2", help="of the calibration windows, separated by commas")
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "command": "python benches/experiments.py MODEL RESULT",
        "environments": [],
        "protocols": [],
        "comparisons": [],
        "rows": {},
    }
    if arguments.result.exists():
        found = json.loads(arguments.result.read_text(encoding="utf-8"))
    rows = found["rows"]
    bench = Workbench(
        arguments.model,
        Protocol(arguments.samples, arguments.sequence_length, arguments.test_samples, arguments.batch_tokens),
    )
    found["model"] = Path(arguments.model).name
    found["parameters"] = bench.matched.parameters
    found.setdefault("dense", bench.perplexity())
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed in seeds:
        for trial in trials(arguments.only):
            name = _row(trial.name, seed)
            if name in rows:
                continue
            row, config = run(bench, trial, seed, rows)
            row["protocol"] = _place(found["protocols"], bench.describe(config))
            row["environment"] = _place(found["environments"], report.environment(torch.device("cpu")))
            row["commit"] = subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip()
            rows[name] = finite(row)
            found["comparisons"] = summary(rows, sorted({row["config"]["seed"] for row in rows.values()}))
            written = arguments.result.with_suffix(".partial")
            written.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            written.replace(arguments.result)
            print(
                f"{name}: {row.get('sparsity', 0):.2%} {row.get('perplexity', row.get('error'))} "
                f"({row['seconds']:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
