"""The joint update of single weights next to the paper's solves in chunks, in one run.

As tests: ``pytest benches/bench_updates.py --benchmark-enable``. ``SURGEON_BENCH_SCALE`` scales the
layer's sides and is 0.05 by default, a smoke test; 1 is a layer of 1536 x 576 with 50 % of its weights
going. As a script it takes medians of alternating rounds and writes one small JSON::

    python benches/bench_updates.py --scale 1 --output benches/results/updates-CPU.json

Factors: second moments of inputs and gradients whose spectra fall like those of a trained model
(condition numbers around 1e4 for A and 1e3 for G), damped as by default. Everything in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon import costs, report, update
from surgeon.linalg import damped_cholesky, inverse_diagonal
from surgeon.select import ElementCosts, ElementSelection

SCALE = float(os.environ.get("SURGEON_BENCH_SCALE", "0.05"))
CHUNK = 2000


class Layer:
    """A layer with its damped factors and the cheapest half of its weights chosen to go."""

    def __init__(self, scale: float) -> None:
        generator = torch.Generator().manual_seed(0)
        R, C = max(int(1536 * scale), 8), max(int(576 * scale), 6)
        self.W = torch.randn(R, C, generator=generator)
        self.G, self.A = (self._moment(n, decay, generator) for n, decay in ((R, 0.5), (C, 1.0)))
        chol_G, chol_A = damped_cholesky(self.G, 0.1, what="G"), damped_cholesky(self.A, 0.01, what="A")
        self.L_G, self.L_A = chol_G.L_nn, chol_A.L_nn
        self.G_damped = self.G + chol_G.damping * torch.eye(R)
        self.A_damped = self.A + chol_A.damping * torch.eye(C)
        cost = costs.element_costs_obs(self.W, inverse_diagonal(self.L_G), inverse_diagonal(self.L_A))
        part = ElementCosts(0, cost, torch.ones_like(cost, dtype=torch.bool))
        self.keep = ~ElementSelection(lambda: iter([part]), cost.numel() // 2, ["layer"]).gone(part)

    @staticmethod
    def _moment(n: int, decay: float, generator: torch.Generator) -> Tensor:
        """Second moment of tokens whose principal variances fall like ``k ** (-2 decay)``."""
        mixing = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
        X = torch.randn(8 * n, n, generator=generator) * torch.arange(1, n + 1).float().pow(-decay)
        X = X @ mixing.T
        return X.T @ X / X.shape[0]

    def joint(self) -> Tensor:
        """Conjugate gradients over the whole matrix, as `--update joint` runs them."""
        return update.remove_elements(self.W, self.keep, [(self.G_damped, self.A_damped)]).W_RC

    def chunked(self) -> Tensor:
        """Chunks of 2000 weights that know nothing of each other, as `--update chunked` runs them."""
        return update.remove_elements_chunked(self.W, self.keep, self.L_G, self.L_A, chunk=CHUNK)

    def loss(self, new: Tensor) -> float:
        """``½ tr(G Δ A Δᵀ)`` with the damped factors."""
        D = (new - self.W).double()
        return float(costs.quadratic_increase(D, self.A_damped.double(), self.G_damped.double()))


@pytest.mark.parametrize("name", ["joint", "chunked"])
def test_update(benchmark: Any, name: str) -> None:
    layer = Layer(SCALE)
    new = benchmark.pedantic(getattr(layer, name), rounds=1)
    assert (new[~layer.keep] == 0).all()
    assert layer.loss(new) < layer.loss(layer.W * layer.keep)


def test_joint_is_the_better_optimum() -> None:
    layer = Layer(SCALE)
    # In one chunk both are the same optimum; the joint solve stops on its loss.
    assert layer.loss(layer.joint()) <= 1.01 * layer.loss(layer.chunked())


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    layer = Layer(arguments.scale)
    times: dict[str, list[float]] = {"joint": [], "chunked": []}
    for _ in range(arguments.rounds):
        for name, taken in times.items():
            taken.append(seconds(getattr(layer, name)))
    losses = {name: layer.loss(getattr(layer, name)()) for name in times}
    losses["none"] = layer.loss(layer.W * layer.keep)
    steps = update.remove_elements(layer.W, layer.keep, [(layer.G_damped, layer.A_damped)]).increases
    exact = update.remove_elements(
        layer.W.double(),
        layer.keep,
        [(layer.G_damped.double(), layer.A_damped.double())],
        steps=1000,
        tolerance=1e-9,
    ).increases[-1]
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    value = {
        "command": f"python benches/bench_updates.py --scale {arguments.scale:g}",
        "environment": report.environment(torch.device("cpu")),
        "layer": list(layer.W.shape),
        "removed": int((~layer.keep).sum()),
        "chunk": CHUNK,
        "seconds": times,
        "chunked_over_joint": medians["chunked"] / medians["joint"],
        "quadratic_loss": {**losses, "optimum": exact},
        "joint_steps": len(steps) - 1,
    }
    arguments.output.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"joint {medians['joint']:.2f} s in {len(steps) - 1} steps, chunked {medians['chunked']:.2f} s")
    print(f"ratio {value['chunked_over_joint']:.1f}; quadratic loss", {k: f"{v:.4g}" for k, v in losses.items()}, exact)


if __name__ == "__main__":
    main()
