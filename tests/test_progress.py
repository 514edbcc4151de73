"""What a run shows, on a terminal and off it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from surgeon import progress
from surgeon.progress import LiveProgress, Observer, PlainProgress, duration

FACTS: dict[str, Any] = {
    "model": "some/[bold]model",
    "family": "LLaMA",
    "layers": 14,
    "parameters": 3840,
    "skipped": 1,
    "method": "surgeon",
    "structure": "rows-columns",
    "shots": 4,
    "device": "cpu",
}
RECORD: dict[str, Any] = {"shot": 2, "sparsity": 0.2, "perplexity": 12.5, "seconds": {"curvature": 61.0, "costs": 2.0}}


def tell(observer: Observer) -> None:
    observer.run_started(shots=4, done=1, facts=FACTS)
    observer.dense(10.0)
    observer.phase(2, "curvature", 8)
    for _ in range(8):
        observer.advance(1, "model.layers.0.mlp.up_proj")
    observer.shot_done(RECORD)
    observer.run_done({})


def test_plain_lines_off_a_terminal() -> None:
    out = io.StringIO()
    tell(PlainProgress(Console(file=out, width=80), every=0.0))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("some/[bold]model (LLaMA): 14 layers with 3,840 parameters can be pruned, 1 linear")
    assert "resuming after shot 1 of 4" in lines
    assert "dense perplexity 10.000" in lines
    assert any(line.startswith("shot 2/4 curvature 3/8 model.layers.0.mlp.up_proj") for line in lines)
    assert lines[-1] == "shot 2/4  removed 20.00%  perplexity 12.500 (dense 10.000)  1m03s"
    assert "\x1b" not in out.getvalue()


def test_live_display_on_a_terminal() -> None:
    out = io.StringIO()
    with LiveProgress(Console(file=out, width=120, force_terminal=True)) as live:
        tell(live)
    text = out.getvalue()
    assert "shot 2/4  removed 20.00%  perplexity 12.500 (dense 10.000)" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 3599.6, 7260)] == ["0s", "59s", "1m00s", "1h00m", "2h01m"]


def test_time_left_counts_the_rest_of_the_shot_and_the_shots_after(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = progress._Clock()
    clock.shots = 3
    assert clock.remaining() is None
    for name, steps, seconds in (("curvature", 4, 40.0), ("costs", 2, 10.0), ("evaluate", 5, 5.0)):
        clock.phase(1, name, steps)
        for _ in range(steps):
            now += seconds / steps
            clock.advance(1)
    assert clock.remaining() == 110.0  # two more shots of 55 s
    clock.phase(2, "curvature", 4)
    now += 10.0
    clock.advance(1)
    assert clock.remaining() == 30.0 + 10.0 + 5.0 + 55.0
    clock.phase(0, "final", 10)
    now += 3.0
    clock.advance(5)
    assert clock.remaining() == 3.0  # of this phase: the shots are over


def test_nothing_is_said_about_time_before_a_shot_has_shown_any(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    clock = progress._Clock()
    clock.shots = 3
    clock.phase(0, "load", 1)
    now += 20.0
    clock.advance(1)
    clock.phase(1, "curvature", 4)
    assert clock.remaining() is None


@pytest.mark.parametrize(("kept", "words"), [(True, "healed: held-out loss"), (False, "fit not kept: held-out loss")])
def test_a_fit_says_what_it_did(kept: bool, words: str) -> None:
    fit = {"kept": kept, "loss_before": 3.5, "loss_after": 3.25 if kept else 3.75}
    line = progress.describe_shot({**RECORD, "heal": fit}, 4, 10.0)
    assert f"{words} 3.500 -> {fit['loss_after']:.3f}" in line
