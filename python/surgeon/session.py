"""The shot loop: curvature, costs, selection, update, evaluation, checkpoint. No mathematics, no printing."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from surgeon.curvature import CurvatureFactors, CurvatureOptions, estimator_for
from surgeon.errors import NumericsError
from surgeon.evaluation import evaluate_windows
from surgeon.heal import HealSettings, heal, planned_windows
from surgeon.layerwise import prune_blocks
from surgeon.models import precision_dtype
from surgeon.operations import LayerwiseShot, begin_shot, check_target, most_removable
from surgeon.progress import Observer
from surgeon.schedule import ElementLedger, Ledger, open_books, round_targets, shot_targets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from surgeon.checkpoint import RunFolder
    from surgeon.config import PruneConfig
    from surgeon.data import Windows
    from surgeon.layers import PrunableLayer
    from surgeon.models import LoadedModel, Matched
    from surgeon.schedule import Books


@dataclass
class ShotRecord:
    """What one shot did; ``surgeon.json`` holds these fields.

    Losses are mean next-token losses over the calibration windows in nats; None where not measured.
    ``heal`` says what a fit of low-rank adapters did, if there was one. ``peak_memory_bytes`` is the
    process' peak so far (of the device if it has its own memory).
    """

    shot: int
    target_sparsity: float
    sparsity: float = 0.0
    units: int = 0
    threshold: float | None = None
    predicted_loss_increase: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    perplexity: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    damping_events: list[dict[str, Any]] = field(default_factory=list)
    heal: dict[str, Any] | None = None


@dataclass
class RunState:
    """Everything that a run knows besides the weights; saved after every shot.

    Attributes:
        ledger: what is gone.
        dense_perplexity: of the unpruned model.
        shots: finished shots.
    """

    ledger: Books
    dense_perplexity: float | None = None
    shots: list[ShotRecord] = field(default_factory=list)


class Session:
    """One pruning run over a live model.

    Args:
        loaded: the model; its prunable layers are changed in place.
        matched: those layers.
        calibration: windows for the curvature; None for methods that need none.
        test: windows for the perplexity; None to leave evaluation out.
        config: the settings.
        observer: told what happens.
        folder: where the state is saved after each shot; None to keep nothing.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        matched: Matched,
        *,
        calibration: Windows | None,
        test: Windows | None,
        config: PruneConfig,
        observer: Observer | None = None,
        folder: RunFolder | None = None,
    ) -> None:
        self.model = loaded.model
        self.layers: tuple[PrunableLayer, ...] = matched.layers
        self._matched = matched
        self.config = config
        self._calibration = calibration
        self._test = test
        self._observer = observer or Observer()
        self._folder = folder
        self._dtype = precision_dtype(config.precision)
        self._shot = 0
        self.state = RunState(open_books(config.structure_value, self.layers))
        most = most_removable(matched, self.model.config, config)
        self.targets = shot_targets(
            config,
            prunable=matched.parameters,
            total=sum(p.numel() for p in self.model.parameters()),
            bytes_a_parameter=loaded.storage_dtype.itemsize,
            most=most,
        )
        check_target(matched, config.structure_value, self.targets[-1], most)

    def run(self) -> RunState:
        """All shots that are not done yet."""
        state = self.state
        if state.dense_perplexity is None and self._test is not None:
            state.dense_perplexity = self._perplexity("dense")
        if state.dense_perplexity is not None:
            self._observer.dense(state.dense_perplexity)
        for shot in range(len(state.shots) + 1, len(self.targets) + 1):
            self._shot = shot
            record = self._run_shot(shot)
            state.shots.append(record)
            if self._folder is not None:
                self._observer.phase(shot, "save", 1)
                self._folder.save_shot(state, self.layers)
                self._observer.advance(1)
            self._observer.shot_done(dataclasses.asdict(record))
        if state.shots and state.shots[-1].loss_after is None and self._calibration is not None:
            state.shots[-1].loss_after = self._calibration_loss()
        return state

    def _run_shot(self, shot: int) -> ShotRecord:
        ledger, target = self.state.ledger, self.targets[shot - 1]
        record = ShotRecord(shot, target_sparsity=target / ledger.total)
        if self.config.method_value.layerwise:
            self._layerwise(record, target)
        else:
            self._global(record, target)
        record.sparsity = ledger.sparsity
        last = shot == len(self.targets)
        if (self.config.heal and last) or (self.config.correction_epochs and not last):
            self._heal(record, self.config.heal_epochs if last else self.config.correction_epochs)
        if self._test is not None:
            with self._timed(record, "evaluate", len(self._test), announce=False):
                record.perplexity = self._perplexity("evaluate")
        record.peak_memory_bytes = peak_memory_bytes(self.model.device)
        return record

    def _global(self, record: ShotRecord, target: int) -> None:
        """One curvature, then costs of all layers, a selection over them and the updates, in rounds."""
        ledger = self.state.ledger
        factors = self._curvature(record)
        predicted = 0.0
        for step in round_targets(ledger, target, self.config.rounds):
            operations = begin_shot(self._matched, self.model.config, self.config, ledger)
            with self._timed(record, "costs", len(self.layers)):
                for index, layer in enumerate(self.layers):
                    with _naming(layer):
                        operations.measure(index, layer.read(self._dtype), factors.layers[index])
                    self._observer.advance(1, layer.name)
            with self._timed(record, "select", 1):
                selected = operations.select(step)
                self._observer.advance(1)
            with self._timed(record, "update", len(self.layers)):
                for index, layer in enumerate(self.layers):
                    with _naming(layer):
                        applied = operations.apply(index, layer.read(self._dtype), factors.layers[index])
                    layer.write(applied.W_RC)
                    predicted += applied.predicted_increase
                    self._observer.advance(1, layer.name)
            operations.commit(ledger)
            record.units += selected.units
            record.threshold = selected.threshold if selected.units else record.threshold
            record.damping_events += [dataclasses.asdict(event) for event in operations.damping_events]
        record.predicted_loss_increase = predicted if self.config.method_value.needs_data else None

    def _layerwise(self, record: ShotRecord, target: int) -> None:
        """Block after block, each on the inputs that the pruned blocks before it give."""
        ledger = self.state.ledger
        assert self._calibration is not None
        assert isinstance(ledger, ElementLedger)
        shot = LayerwiseShot(self.layers, self.config, target)
        with self._timed(record, "blocks", len(self._matched.blocks) * len(self._calibration)):
            prune_blocks(
                self.model,
                self._matched.blocks,
                self.layers,
                self._calibration,
                batch_tokens=self.config.batch_tokens,
                prune_layer=shot.prune_layer,
                advance=self._observer.advance,
                accumulate=self._dtype,
            )
        record.units = shot.commit(ledger)
        record.damping_events = [dataclasses.asdict(event) for event in shot.damping_events]

    def _heal(self, record: ShotRecord, epochs: float) -> None:
        """Fit low-rank adapters on what is left and merge them; what is zero stays zero."""
        assert self._calibration is not None
        settings = HealSettings(
            rank=self.config.lora_rank,
            learning_rate=self.config.lora_learning_rate,
            epochs=epochs,
            # Every fit its own windows: short ones would all visit the same few.
            seed=self.config.seed + record.shot,
        )
        with self._timed(record, "heal", planned_windows(len(self._calibration), settings)):
            found = heal(
                self.model,
                self.layers,
                self._calibration,
                settings=settings,
                batch_tokens=self.config.batch_tokens,
                keeps=self._keep if isinstance(self.state.ledger, Ledger) else None,
                advance=self._observer.advance,
            )
        record.heal = dataclasses.asdict(found)

    def _keep(self, index: int) -> torch.Tensor:
        """What of a layer's rows and columns still stands, bool ``[R, C]``."""
        ledger = self.state.ledger
        assert isinstance(ledger, Ledger)
        return torch.from_numpy(ledger.keep_rows(index)[:, None] & ledger.keep_columns(index)[None, :])

    def _curvature(self, record: ShotRecord) -> CurvatureFactors:
        config = self.config
        options = CurvatureOptions(
            fisher=config.fisher,
            fisher_samples=config.fisher_samples,
            terms=config.kronecker_terms,
            seed=config.seed,
        )
        windows = 0 if self._calibration is None else len(self._calibration)
        with self._timed(record, "curvature", windows):
            factors = estimator_for(config.curvature_value)(
                self.model,
                self.layers,
                self._calibration,
                batch_tokens=config.batch_tokens,
                accumulate=self._dtype,
                advance=self._observer.advance,
                options=options,
            )
        record.loss_before = factors.loss
        if self.state.shots:
            self.state.shots[-1].loss_after = factors.loss
        return factors

    def _calibration_loss(self) -> float:
        assert self._calibration is not None
        self._observer.phase(self._shot, "loss", len(self._calibration))
        return evaluate_windows(
            self.model,
            self._calibration,
            batch_tokens=self.config.batch_tokens,
            advance=self._observer.advance,
        ).loss

    def _perplexity(self, phase: str) -> float:
        assert self._test is not None
        self._observer.phase(self._shot, phase, len(self._test))
        return evaluate_windows(
            self.model, self._test, batch_tokens=self.config.batch_tokens, advance=self._observer.advance
        ).perplexity

    @contextmanager
    def _timed(self, record: ShotRecord, name: str, steps: int, *, announce: bool = True) -> Iterator[None]:
        if announce:
            self._observer.phase(record.shot, name, steps)
        begun = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        record.seconds[name] = record.seconds.get(name, 0.0) + time.perf_counter() - begun


@contextmanager
def _naming(layer: PrunableLayer) -> Iterator[None]:
    """Give errors of the pure mathematics the layer that they do not know."""
    try:
        yield
    except NumericsError as error:
        if error.layer is not None:
            raise
        raise type(error)(f"layer {layer.name}: {error}", layer=layer.name, index=error.index) from error


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device if it has its own, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
