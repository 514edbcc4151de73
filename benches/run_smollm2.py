"""Prune SmolLM2-135M as in the README's table and write the figures to a result file.

    python benches/run_smollm2.py models/smollm2-135m benches/results/smollm2-rows-columns.json

What cannot be avoided, a bare forward and an activation-only backward pass over the same windows, is
timed three times after the run in the same process; the ratio of a shot to their median is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import surgeon
from surgeon import PruneConfig, runner
from surgeon.evaluation import next_token_loss_sum
from surgeon.models import load_model, load_tokenizer
from surgeon.progress import PlainProgress
from surgeon.session import peak_memory_bytes

# What the paper's public implementation reaches in the same setting, on this model and these
# windows: perplexity after each shot, and its largest resident set.
PUBLIC = {"perplexity": [21.008, 25.127, 33.858, 41.101, 54.771], "dense": 19.771, "peak_gigabytes": 7.8}


def bare_pass_seconds(config: PruneConfig) -> float:
    """Seconds of a forward and an activation-only backward pass, without any hook of ours."""
    loaded = load_model(config.model, device=runner.choose_device(config.device), precision=torch.float32)
    windows = runner.calibration_set(config, loaded, load_tokenizer(config.model), 512)
    loaded.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    begun = time.perf_counter()
    for batch in windows.batches(config.batch_tokens):
        logits = loaded.model(input_ids=batch.ids, use_cache=False).logits
        next_token_loss_sum(logits, batch.ids, None)[0].backward()
    return time.perf_counter() - begun


def without_evaluation(seconds: dict[str, float]) -> float:
    return sum(value for phase, value in seconds.items() if phase != "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--structure", default="rows-columns")
    parser.add_argument("--rank-by", choices=("cost", "cost-per-parameter"))
    parser.add_argument("--bare-passes", type=int, default=3, help="0: do not time any")
    parser.add_argument("--batch-tokens", type=int, default=512)
    arguments = parser.parse_args()
    config = PruneConfig(
        model=arguments.model,
        structure=arguments.structure,
        rank_by=arguments.rank_by,
        sparsity=0.3,
        shots=5,
        samples=32,
        sequence_length=512,
        test_samples=40,
        seed=0,
        damping_g=0.1,
        damping_a=0.01,
        batch_tokens=arguments.batch_tokens,
    )
    from rich.console import Console

    with tempfile.TemporaryDirectory() as scratch:
        # The run first: the peak of its memory is then its own.
        report = surgeon.prune(config, Path(scratch) / "out", observer=PlainProgress(Console(stderr=True))).report
    peak = peak_memory_bytes(torch.device("cpu"))
    bare = [bare_pass_seconds(config) for _ in range(arguments.bare_passes)]
    value: dict[str, Any] = {
        "command": f"python benches/run_smollm2.py MODEL RESULT --structure {arguments.structure}"
        + (f" --rank-by {arguments.rank_by}" if arguments.rank_by else ""),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "environment": report["environment"],
        "config": {**report["config"], "model": Path(arguments.model).name},
        "protocol": report["protocol"],
        "dense": report["dense"],
        "shots": report["shots"],
        "final": report["final"],
        "public_implementation": PUBLIC,
        "bare_pass_seconds": bare,
        "shot_over_bare_pass": [
            without_evaluation(shot["seconds"]) / statistics.median(bare) for shot in report["shots"] if bare
        ],
        # Damage is ln(perplexity / dense), theirs that of rows + columns.
        "damage_over_public": [
            math.log(shot["perplexity"] / report["dense"]["perplexity"]) / math.log(theirs / PUBLIC["dense"])
            for shot, theirs in zip(report["shots"], PUBLIC["perplexity"], strict=True)
        ],
        "peak_gigabytes": peak / 1e9,
    }
    arguments.result.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    for number, (shot, theirs) in enumerate(zip(report["shots"], PUBLIC["perplexity"], strict=True)):
        line = f"{shot['sparsity']:.2%}  {shot['perplexity']:.3f}  public {theirs:.3f}"
        line += f"  damage {value['damage_over_public'][number]:.3f} x"
        print(line + (f"  {value['shot_over_bare_pass'][number]:.2f} x the bare pass" if bare else ""))
    print(f"peak {peak / 1e9:.2f} GB" + (f", bare pass {statistics.median(bare):.1f} s" if bare else ""))


if __name__ == "__main__":
    main()
