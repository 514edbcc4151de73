"""Speed and memory of the selection core next to PyTorch and NumPy, in one run.

As tests: ``pytest benches/bench_selection.py --benchmark-enable``. ``SURGEON_BENCH_SCALE`` scales
the sizes and is 0.01 by default, a smoke test; 1 is full scale: 10 million rows and columns over
500 layers, 100 million float32 costs in 50 layers.

As a script it takes medians of alternating rounds and writes one small JSON with ratios::

    python benches/bench_selection.py --scale 1 --output benches/results/selection-CPU.json

Rivals get their costs as one contiguous array, made outside of the clock. Memory is the peak of
the resident set above its level when the inputs are in place, in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from surgeon import _core

SCALE = float(os.environ.get("SURGEON_BENCH_SCALE", "0.01"))
RIVALS = ("numpy.partition", "torch.kthvalue", "torch.sort")
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One call to be timed, and how often."""

    name: str
    call: Call
    rounds: int = 7


def cross_cases(scale: float) -> list[Case]:
    """10 million rows and columns over 500 square layers at full scale."""
    rng = np.random.default_rng(0)
    layers, side = 500, max(int(10_000 * scale), 4)
    rows, columns = ([rng.lognormal(0, 2, side) for _ in range(layers)] for _ in range(2))
    alive = [np.ones(side, bool)] * layers
    total = layers * side * side
    sizes = [np.full(side, side, np.uint64)] * layers

    def pair(percent: int) -> list[Case]:
        target = _core.removal_target(total, percent / 100)
        return [
            Case(
                f"rows and columns, {percent} %",
                lambda: _core.select_rows_columns(rows, columns, alive, alive, target),
            ),
            Case(
                f"units per parameter, {percent} %",
                lambda: _core.select_units(rows, sizes, alive, target, per_parameter=True),
            ),
        ]

    return pair(10) + pair(50)


def element_layers(scale: float, dtype: type[np.floating[Any]] = np.float32) -> list[NDArray[Any]]:
    """50 layers of costs like those of weights: squares of normal numbers, 100 million in all."""
    rng = np.random.default_rng(1)
    count = max(int(2_000_000 * scale), 1000)
    return [np.square(rng.standard_normal(count, np.float32)).astype(dtype) for _ in range(50)]


def threshold_cases(scale: float) -> list[Case]:
    """The exact median of 100 million float32 costs."""
    layers = element_layers(scale)
    flat = np.concatenate(layers)
    tensor = torch.from_numpy(flat)
    rank = flat.size // 2
    truth = float(np.partition(flat, rank - 1)[rank - 1])
    threshold = _core.element_threshold(layers, rank)
    assert threshold.cost == truth

    def masks() -> None:
        ties = threshold.ties
        for layer, costs in enumerate(layers):
            _, ties = _core.element_mask(layer, costs, threshold, ties)

    return [
        Case("element threshold", lambda: _core.element_threshold(layers, rank)),
        Case("numpy.partition", lambda: np.partition(flat, rank - 1)[rank - 1], 5),
        Case("torch.kthvalue", lambda: torch.kthvalue(tensor, rank).values, 5),
        Case("torch.sort", lambda: torch.sort(tensor).values[rank - 1], 3),
        Case("element masks", masks),
    ]


def nm_cases(scale: float) -> list[Case]:
    """2:4 and 4:8 of one matrix, next to a comparison that reads and writes the same bytes."""
    side = max(int(8192 * scale**0.5) // 8 * 8, 64)
    costs = np.square(np.random.default_rng(2).standard_normal((side, side), np.float32))
    tensor = torch.from_numpy(costs)
    mask = torch.empty(tensor.shape, dtype=torch.bool)

    def topk(keep: int, group: int) -> torch.Tensor:
        groups = tensor.view(-1, group)
        best = groups.topk(keep, dim=1).indices
        return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, best, value=True)

    assert bool((torch.from_numpy(_core.nm_mask(costs, 2, 4)).view(-1, 4) == topk(2, 4)).all())
    return [
        Case("2:4 mask", lambda: _core.nm_mask(costs, 2, 4)),
        Case("4:8 mask", lambda: _core.nm_mask(costs, 4, 8)),
        Case("compare in place", lambda: torch.gt(tensor, 1.0, out=mask)),
        Case("compare to new memory", lambda: torch.gt(tensor, 1.0)),
        Case("torch.topk 2:4", lambda: topk(2, 4), 3),
    ]


Make = Callable[[float], list[Case]]
NAMES: dict[Make, list[str]] = {
    cross_cases: [
        f"{what}, {percent} %" for percent in (10, 50) for what in ("rows and columns", "units per parameter")
    ],
    threshold_cases: ["element threshold", *RIVALS, "element masks"],
    nm_cases: ["2:4 mask", "4:8 mask", "compare in place", "compare to new memory", "torch.topk 2:4"],
}


@functools.cache
def built(make: Make, scale: float) -> dict[str, Case]:
    """Inputs are large, so they are made when the first test wants them."""
    return {case.name: case for case in make(scale)}


@pytest.mark.parametrize(("make", "name"), [(make, name) for make, names in NAMES.items() for name in names])
def test_speed(make: Make, name: str, benchmark: Any) -> None:
    case = built(make, SCALE)[name]
    benchmark.pedantic(case.call, rounds=case.rounds, warmup_rounds=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_the_threshold() -> None:
    assert peak_beyond_input(SCALE, "surgeon") < 100


# --- Script ---------------------------------------------------------------------------------------


def measure_peak(scale: float, what: str) -> float:
    """Peak resident megabytes above the level with the inputs in place. Linux only."""

    def resident(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    layers = element_layers(scale)
    rank = sum(layer.size for layer in layers) // 2
    flat = np.concatenate(layers) if what != "surgeon" else None
    if flat is not None:
        layers.clear()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if flat is None:
        _core.element_threshold(layers, rank)
    elif what == "numpy.partition":
        np.partition(flat, rank - 1)
    else:
        torch.kthvalue(torch.from_numpy(flat), rank)
    return (resident("VmHWM") - before) / 1024


def peak_beyond_input(scale: float, what: str) -> float:
    """`measure_peak` in a fresh process."""
    command = [sys.executable, __file__, "--scale", str(scale), "--peak", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def time_all(cases: list[Case]) -> dict[str, float]:
    """Median seconds of each case. Rounds alternate, so that a busy moment hits all alike."""
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(max(case.rounds for case in cases) + 1):
        for case in cases:
            if turn <= case.rounds:
                start = time.perf_counter()
                case.call()
                seconds[case.name].append(time.perf_counter() - start)
    # The first round warms up.
    return {name: round(statistics.median(times[1:]), 6) for name, times in seconds.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(scale: float) -> dict[str, Any]:
    """Everything a reader needs to judge the figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    load_before = os.getloadavg()[0]
    cross, threshold, nm = (time_all(make(scale)) for make in (cross_cases, threshold_cases, nm_cases))
    ours = threshold["element threshold"]
    side = max(int(8192 * scale**0.5) // 8 * 8, 64)
    return {
        "device": {"cpu": cpu_name(), "cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {
            "surgeon": _core.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "scale": scale,
        "sizes": {
            "rows_and_columns": 2 * 500 * max(int(10_000 * scale), 4),
            "elements": 50 * max(int(2_000_000 * scale), 1000),
            "nm_matrix": [side, side],
        },
        "median_seconds": {**cross, **threshold, **nm},
        "element_threshold_times_faster_than": {name: round(threshold[name] / ours, 1) for name in RIVALS},
        "nm_mask_times_the_time_of_a_comparison": {
            name: round(nm[name] / nm["compare to new memory"], 2) for name in ("2:4 mask", "4:8 mask")
        },
        "peak_megabytes_beyond_input": {
            what: round(peak_beyond_input(scale, what), 1) for what in ("surgeon", "numpy.partition", "torch.kthvalue")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scale", type=float, default=SCALE)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(measure_peak(options.scale, options.peak))
        return
    text = json.dumps(report(options.scale), indent=2) + "\n"
    if options.output:
        options.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
