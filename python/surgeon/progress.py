"""What a run tells while it goes on: to a person, to a log, to a file. The session only emits."""

from __future__ import annotations

import json
import math
import time
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from rich.console import Console
    from rich.progress import Progress, TaskID


def finite(value: Any) -> Any:
    """The same plain values with None for numbers that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return value


class Observer:
    """Receives what happens; every method does nothing until a subclass says otherwise."""

    def run_started(self, *, shots: int, done: int, facts: dict[str, Any]) -> None:
        """The run begins with ``done`` of ``shots`` shots already there; ``facts`` are for the log."""

    def dense(self, perplexity: float) -> None:
        """The unpruned model was evaluated."""

    def phase(self, shot: int, name: str, steps: int) -> None:
        """A phase of ``steps`` steps begins; shot 0 is before the first."""

    def advance(self, steps: int, detail: str = "") -> None:
        """Steps of the current phase are done; ``detail`` is a layer or window."""

    def shot_done(self, record: dict[str, Any]) -> None:
        """A shot is complete."""

    def run_done(self, facts: dict[str, Any]) -> None:
        """The run is complete."""


class Observers(Observer):
    """Passes everything on to several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def run_started(self, *, shots: int, done: int, facts: dict[str, Any]) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.run_started(shots=shots, done=done, facts=facts)

    def dense(self, perplexity: float) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.dense(perplexity)

    def phase(self, shot: int, name: str, steps: int) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.phase(shot, name, steps)

    def advance(self, steps: int, detail: str = "") -> None:
        """Pass on."""
        for observer in self._observers:
            observer.advance(steps, detail)

    def shot_done(self, record: dict[str, Any]) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.shot_done(record)

    def run_done(self, facts: dict[str, Any]) -> None:
        """Pass on."""
        for observer in self._observers:
            observer.run_done(facts)


class EventLog(Observer):
    """``events.jsonl``: one JSON object a line, appended and flushed as things happen."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: str, **facts: Any) -> None:
        record = {"time": round(time.time(), 3), "event": event, **facts}
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def run_started(self, *, shots: int, done: int, facts: dict[str, Any]) -> None:
        """Log it."""
        self._write("run_started", **{**facts, "shots": shots, "done": done})

    def dense(self, perplexity: float) -> None:
        """Log it."""
        self._write("dense", perplexity=perplexity)

    def phase(self, shot: int, name: str, steps: int) -> None:
        """Log it."""
        self._write("phase", shot=shot, phase=name, steps=steps)

    def shot_done(self, record: dict[str, Any]) -> None:
        """Log it."""
        self._write("shot_done", **record)

    def run_done(self, facts: dict[str, Any]) -> None:
        """Log it."""
        self._write("run_done", **facts)


def describe_shot(record: dict[str, Any], shots: int, dense: float | None) -> str:
    """One line about a shot."""
    against = "" if dense is None else f" (dense {dense:.3f})"
    perplexity = record.get("perplexity")
    shown = "not evaluated" if perplexity is None else f"{perplexity:.3f}{against}"
    fit = record.get("heal")
    healed = ""
    if fit is not None:
        losses = f"{fit['loss_before']:.3f} -> {fit['loss_after']:.3f}"
        healed = f"  {'healed' if fit['kept'] else 'fit not kept'}: held-out loss {losses}"
    return (
        f"shot {record['shot']}/{shots}  removed {record['sparsity']:.2%}  perplexity {shown}{healed}  "
        f"{duration(sum(record['seconds'].values()))}"
    )


def duration(seconds: float) -> str:
    """``7s``, ``3m05s``, ``2h04m``."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


# Phases of a shot, in order. All others (load, dense, loss, final, export) happen once a run.
PHASES = ("curvature", "costs", "select", "update", "evaluate", "save")


class _Clock:
    """Seconds that the phases of a shot take, and from them how long the rest of the run will take.

    A phase is known once it ran, or while it runs from what is done of it; phases not yet known are
    left out, so the first shot's estimate covers what has been seen so far.
    """

    def __init__(self) -> None:
        self.shots = 0
        self._shot = 0
        self._seconds: dict[str, float] = {}
        self._name = ""
        self._steps = 1
        self._done = 0
        self._begun = 0.0

    def phase(self, shot: int, name: str, steps: int) -> None:
        self._shot, self._name, self._steps, self._done = shot, name, max(steps, 1), 0
        self._begun = time.monotonic()

    def advance(self, steps: int) -> None:
        self._done += steps
        if self._done >= self._steps and self._name in PHASES:
            self._seconds[self._name] = time.monotonic() - self._begun

    def remaining(self) -> float | None:
        """Seconds left of the run (of the phase, for one that is not of a shot); None while not known."""
        spent = time.monotonic() - self._begun
        whole = spent / self._done * self._steps if self._done else self._seconds.get(self._name)
        if self._name not in PHASES:
            return None if whole is None else max(whole - spent, 0.0)
        known = dict(self._seconds)
        if whole is not None:
            known.setdefault(self._name, whole)
        if not known:
            return None
        left = 0.0 if whole is None or self._done >= self._steps else max(whole - spent, 0.0)
        left += sum(known.get(name, 0.0) for name in PHASES[PHASES.index(self._name) + 1 :])
        return left + sum(known.values()) * (self.shots - self._shot)


class PlainProgress(Observer):
    """Plain lines for logs: one a phase at most every few seconds, one a shot."""

    def __init__(self, console: Console, *, every: float = 15.0) -> None:
        self._console = console
        self._every = every
        self._clock = _Clock()
        self._label = ""
        self._steps = 1
        self._done = 0
        self._last = 0.0
        self._dense: float | None = None

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def run_started(self, *, shots: int, done: int, facts: dict[str, Any]) -> None:
        """Say what was matched."""
        self._clock.shots = shots
        self._line(_headline(facts))
        if done:
            self._line(f"resuming after shot {done} of {shots}")

    def dense(self, perplexity: float) -> None:
        """Say the dense perplexity."""
        self._dense = perplexity
        self._line(f"dense perplexity {perplexity:.3f}")

    def phase(self, shot: int, name: str, steps: int) -> None:
        """Remember the phase."""
        self._clock.phase(shot, name, steps)
        self._label, self._steps, self._done = (
            f"shot {shot}/{self._clock.shots} {name}" if shot else name,
            steps,
            0,
        )
        self._last = time.monotonic()

    def advance(self, steps: int, detail: str = "") -> None:
        """Print a line if the last one is old."""
        self._done += steps
        self._clock.advance(steps)
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            left = self._clock.remaining()
            eta = "" if left is None else f"  about {duration(left)} left"
            self._line(f"{self._label} {self._done}/{self._steps} {detail}{eta}".rstrip())

    def shot_done(self, record: dict[str, Any]) -> None:
        """Print the shot's line."""
        self._line(describe_shot(record, self._clock.shots, self._dense))


class LiveProgress(Observer):
    """A calm live display on a terminal: the whole run, the current phase, ETA, perplexity."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        self._clock = _Clock()
        self._progress: Progress = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        self._run: TaskID | None = None
        self._phase: TaskID | None = None
        self._dense: float | None = None
        self._perplexity: float | None = None

    def __enter__(self) -> Self:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing and leave the terminal as it was."""
        self._progress.stop()

    def _note(self) -> str:
        parts = []
        if self._perplexity is not None:
            against = "" if self._dense is None or self._dense == self._perplexity else f" (dense {self._dense:.2f})"
            parts.append(f"perplexity {self._perplexity:.2f}{against}")
        left = self._clock.remaining()
        if left is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)

    def run_started(self, *, shots: int, done: int, facts: dict[str, Any]) -> None:
        """Draw the run's bar."""
        self._clock.shots = shots
        self._progress.console.print(_headline(facts), highlight=False, markup=False)
        self._run = self._progress.add_task("shots", total=shots, completed=done, note="")

    def dense(self, perplexity: float) -> None:
        """Show the dense perplexity."""
        self._dense = self._perplexity = perplexity
        self._progress.console.print(f"dense perplexity {perplexity:.3f}", highlight=False)

    def phase(self, shot: int, name: str, steps: int) -> None:
        """Draw the phase's bar."""
        self._clock.phase(shot, name, steps)
        if self._phase is not None:
            self._progress.remove_task(self._phase)
        self._phase = self._progress.add_task(name, total=steps, note="")

    def advance(self, steps: int, detail: str = "") -> None:
        """Move the bars."""
        self._clock.advance(steps)
        if self._phase is not None:
            self._progress.update(self._phase, advance=steps, note=detail)
        if self._run is not None:
            self._progress.update(self._run, note=self._note())

    def shot_done(self, record: dict[str, Any]) -> None:
        """Leave one line about the shot above the bars."""
        self._perplexity = record.get("perplexity")
        line = describe_shot(record, self._clock.shots, self._dense)
        self._progress.console.print(line, highlight=False, markup=False)
        if self._run is not None:
            self._progress.update(self._run, completed=record["shot"], note=self._note())


def _headline(facts: dict[str, Any]) -> str:
    return (
        f"{facts['model']} ({facts['family']}): {facts['layers']} layers with {facts['parameters']:,} parameters "
        f"can be pruned, {facts['skipped']} linear layers are left alone; {facts['method']}, {facts['structure']}, "
        f"{facts['shots']} shot{'' if facts['shots'] == 1 else 's'} on {facts['device']}"
    )
