"""The main job in one call: load, calibrate, prune, write. What the command line runs."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon import __version__, data, report
from surgeon.checkpoint import RunFolder, check_output, model_fingerprint
from surgeon.config import PruneConfig
from surgeon.errors import ConfigError, NoTokenizerError
from surgeon.evaluation import Evaluation, evaluate_windows
from surgeon.export import round_to_storage, write_checkpoint
from surgeon.heal import require_peft
from surgeon.models import load_model, load_tokenizer, match_layers, precision_dtype
from surgeon.progress import EventLog, Observer, Observers
from surgeon.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from surgeon.data import Windows
    from surgeon.models import LoadedModel

DEFAULT_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """A finished run.

    Attributes:
        out: folder of the pruned checkpoint.
        report: content of its ``surgeon.json``.
    """

    out: Path
    report: dict[str, Any]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU.

    Raises:
        ConfigError: it is no device, or not one of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device {name!r}: give auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"device {name!r} is not supported: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def prune(
    config: PruneConfig, out: Path | str, *, resume: bool = False, observer: Observer | None = None
) -> PruneResult:
    """Prune a pretrained model and write the result.

    Args:
        config: the settings.
        out: folder to write; must not exist or be empty.
        resume: continue an unfinished run of the same settings.
        observer: told what happens.

    Raises:
        SurgeonError: any of its children; OUT is then not there, and what was done can be resumed.
    """
    out = Path(out)
    check_output(out, resume=resume)
    if config.heals:
        require_peft()
    told = observer or Observer()
    told.phase(0, "load", 1)
    device = choose_device(config.device)
    loaded = load_model(config.model, device=device, precision=precision_dtype(config.precision))
    matched = match_layers(loaded.model)
    tokenizer = _tokenizer(config.model, config.calibration, config.test_data)
    length = fit_length(loaded, config.sequence_length)
    config = dataclasses.replace(config, sequence_length=length)
    calibration = calibration_set(config, loaded, tokenizer, length) if config.needs_data else None
    test = test_set(config.test_data, loaded, tokenizer, length, config.test_samples)
    fingerprint = {
        "settings": config.digest(),
        "model": model_fingerprint(loaded),
        "calibration": None if calibration is None else calibration.digest,
        "test data": test.digest,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "surgeon": __version__,
    }
    facts = {
        "model": config.model,
        "family": matched.adapter.family,
        "layers": len(matched.layers),
        "parameters": matched.parameters,
        "skipped": len(matched.skipped),
        "method": config.method,
        "structure": config.structure,
        "shots": config.shots,
        "device": str(device),
    }
    told.advance(1)
    with RunFolder(out, fingerprint, resume=resume) as folder:
        log = EventLog(folder.path / "events.jsonl")
        told = Observers([log, told])
        try:
            session = Session(
                loaded,
                matched,
                calibration=calibration,
                test=test,
                config=config,
                observer=told,
                folder=folder,
            )
            saved = folder.restore(matched.layers, config.structure_value) if resume else None
            if saved is not None:
                session.state = saved
            told.run_started(shots=config.shot_count, done=len(session.state.shots), facts=facts)
            state = session.run()
            final = _finish(loaded, tokenizer, session=session, test=test, folder=folder.path, told=told)
            value = report.build(
                config=config,
                matched=matched,
                state=state,
                protocol=report.protocol(config, calibration, test),
                environment=report.environment(device),
                final=final,
            )
            report.write(value, folder.path)
            told.run_done(final)
        finally:
            log.close()
        folder.finish()
    return PruneResult(out, value)


def _finish(
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    session: Session,
    test: Windows,
    folder: Path,
    told: Observer,
) -> dict[str, Any]:
    """Round to the checkpoint's dtype, measure that, write it."""
    state = session.state
    perplexity = state.shots[-1].perplexity
    if round_to_storage(loaded):
        told.phase(0, "final", len(test))
        perplexity = evaluate_windows(
            loaded.model, test, batch_tokens=session.config.batch_tokens, advance=told.advance
        ).perplexity
    removed = state.ledger.removed
    if session.config.structure_value.elementwise:  # rounding may have made a zero of a tiny weight
        removed = sum(int((layer.read(layer.weight.dtype) == 0).sum()) for layer in session.layers)
    told.phase(0, "export", 1)
    total = sum(p.numel() for p in loaded.model.parameters())
    size = write_checkpoint(loaded, tokenizer, folder)
    told.advance(1)
    return {
        "perplexity": perplexity,
        "sparsity": removed / max(state.ledger.total, 1),
        "removed_parameters": removed,
        "prunable_parameters": state.ledger.total,
        "parameters": total,
        "kept_parameters": total - removed,
        "bytes": size,
    }


def evaluate(
    model: str,
    *,
    data_source: str,
    sequence_length: int | None = None,
    samples: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    batch_tokens: int = 2048,
    observer: Observer | None = None,
) -> tuple[Evaluation, Windows]:
    """Perplexity of a checkpoint on a text.

    Raises:
        SurgeonError: any of its children.
    """
    told = observer or Observer()
    # The same checks as for a run, and a line that names the same options.
    PruneConfig(model=model, sequence_length=sequence_length, test_samples=samples, precision=precision)
    told.phase(0, "load", 1)
    loaded = load_model(model, device=choose_device(device), precision=precision_dtype(precision))
    length = fit_length(loaded, sequence_length)
    windows = test_set(data_source, loaded, _tokenizer(model, data_source), length, samples)
    told.advance(1)
    told.phase(0, "evaluate", len(windows))
    return evaluate_windows(loaded.model, windows, batch_tokens=batch_tokens, advance=told.advance), windows


def calibration_set(
    config: PruneConfig, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase | None, length: int
) -> Windows:
    """Calibration windows of a configuration.

    Raises:
        DataError: the text is missing, too short, or not of the model's vocabulary.
    """
    windows = data.calibration_windows(
        data.token_ids(config.calibration, "train", tokenizer),
        source=config.calibration,
        samples=config.samples,
        length=length,
        seed=config.seed,
    )
    windows.check_vocabulary(vocabulary_size(loaded))
    return windows


def test_set(
    source: str,
    loaded: LoadedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int,
    samples: int | None,
) -> Windows:
    """Test windows of a text.

    Raises:
        DataError: the text is missing, too short, or not of the model's vocabulary.
    """
    ids = data.token_ids(source, "test", tokenizer)
    windows = data.test_windows(ids, source=source, length=length, samples=samples)
    windows.check_vocabulary(vocabulary_size(loaded))
    return windows


def vocabulary_size(loaded: LoadedModel) -> int:
    """Rows of the model's input embedding."""
    weight: torch.Tensor = loaded.model.get_input_embeddings().get_parameter("weight")
    return weight.shape[0]


def fit_length(loaded: LoadedModel, length: int | None) -> int:
    """Tokens a window: as asked, or 2048 as far as the model has positions.

    Raises:
        ConfigError: more are asked for than the model has.
    """
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    if length is None:
        return DEFAULT_LENGTH if limit is None else min(DEFAULT_LENGTH, int(limit))
    if limit is not None and length > limit:
        raise ConfigError(
            f"sequence-length is {length}, the model was made for at most {limit} positions: lower --sequence-length"
        )
    return length


def _tokenizer(model: str, *sources: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None is fine where all data are tokens already."""
    try:
        return load_tokenizer(model)
    except NoTokenizerError:
        if all(source.endswith(".safetensors") for source in sources):
            return None
        raise
