"""The folder of a run: refused if it holds somebody's files, built aside, renamed when finished.

While a run goes on everything is in ``OUT.partial/`` beside OUT: ``state/`` with what resume needs,
``events.jsonl``, and at the end the checkpoint. One rename makes it OUT, so that OUT is a finished
result or is not there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from typing import IO, TYPE_CHECKING, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgeon.errors import OutputError, ResumeError, SurgeonError
from surgeon.schedule import read_books
from surgeon.session import RunState, ShotRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from surgeon.layers import PrunableLayer
    from surgeon.models import LoadedModel
    from surgeon.structures import Structure

STATE_VERSION = 1


def partial_path(out: Path) -> Path:
    """Where a run is until it is finished: beside OUT, so that one rename ends it."""
    out = out.absolute()
    return out.with_name(out.name + ".partial")


def check_output(out: Path, *, resume: bool) -> None:
    """Refuse an OUT that cannot become this run's, before anything heavy runs.

    Raises:
        OutputError: it is a file or holds files, an unfinished run or something else is in
            ``OUT.partial``, or the parent cannot be written.
        ResumeError: there is nothing to resume.
    """
    partial = partial_path(out)
    try:
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise OutputError(f"{out} is not a folder: choose another -o")
        if out.is_dir() and any(out.iterdir()):
            raise OutputError(f"{out} holds files already: nothing was changed; choose another -o or move them away")
        parent = out.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OutputError(f"cannot write to {parent}")
        unfinished = (partial / "state" / "run.json").exists()
        # A run that was killed before it had begun leaves a lock at most.
        blank = not partial.exists() or {p.name for p in partial.rglob("*")} <= {"state", "lock", "run.tmp"}
    except OSError as error:
        raise OutputError(f"{out} cannot be the output: {error.strerror}") from None
    if resume and not unfinished:
        raise ResumeError(f"there is no unfinished run to resume in {partial}")
    if unfinished and not resume:
        raise OutputError(
            f"an unfinished run is in {partial}: add --resume to continue it, or delete that folder to start anew"
        )
    if not unfinished and not blank:
        raise OutputError(f"{partial} is in the way and is no run: choose another -o or move it away")


def model_fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 over names, shapes and values of every parameter."""
    state = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        state.update(f"{name}{tuple(parameter.shape)}{loaded.storage_dtype}".encode())
        state.update(parameter.detach().cpu().contiguous().numpy().data)
    return state.hexdigest()


class RunFolder:
    """``OUT.partial`` of one run, locked while it is open.

    Args:
        out: the folder that the finished run becomes.
        fingerprint: what must be equal for a resume: name → digest or value.
        resume: continue what is there, instead of refusing it.

    Raises:
        OutputError: see :func:`check_output`; or another process is at work on it.
        ResumeError: there is nothing to resume, or it is another run's.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, resume: bool) -> None:
        check_output(out, resume=resume)
        self.out = out.absolute()
        self.path = partial_path(out)
        self._state = self.path / "state"
        self._fingerprint = fingerprint
        self._lock: IO[str] | None = None
        self._finishing = False
        try:
            self._state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {self.path}: {error.strerror}") from None
        self._take_lock()
        try:
            if resume:
                self._check_fingerprint()
            else:
                _write_json(self._state / "run.json", {"version": STATE_VERSION, "fingerprint": fingerprint})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """The folder is open since it was made."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock; a run that fails without a finished shot leaves nothing behind."""
        if kind is not None and not self._finishing and not any(self._state.glob("shot-*")):
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_shot(self, state: RunState, layers: Sequence[PrunableLayer]) -> None:
        """Save the weights of the prunable layers and the run's state, atomically.

        The shot before is removed once this one is complete.
        """
        begun = time.perf_counter()
        done = len(state.shots)
        target = self._state / f"shot-{done:04d}"
        scratch = self._state / f"tmp-{done:04d}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for layer in layers:
            for name, parameter in layer.module.named_parameters(recurse=False):
                tensors[f"{layer.name}.{name}"] = parameter.detach().cpu().contiguous()
        save_file(tensors, scratch / "weights.safetensors")
        _sync(scratch / "weights.safetensors")
        (scratch / "ledger.bin").write_bytes(state.ledger.to_bytes())
        _sync(scratch / "ledger.bin")
        state.shots[-1].seconds["save"] = time.perf_counter() - begun
        _write_json(
            scratch / "state.json",
            {
                "dense_perplexity": state.dense_perplexity,
                "shots": [dataclasses.asdict(record) for record in state.shots],
                "weights_sha256": _digest(scratch / "weights.safetensors"),
            },
        )
        scratch.replace(target)
        _sync(self._state)
        for old in self._state.glob("shot-*"):
            if old != target:
                shutil.rmtree(old)

    def restore(self, layers: Sequence[PrunableLayer], structure: Structure) -> RunState | None:
        """Put the last finished shot back into the model; None if no shot was finished.

        Raises:
            ResumeError: the saved state is damaged.
        """
        found = sorted(self._state.glob("shot-*"))
        if not found:
            return None
        folder = found[-1]
        try:
            saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if saved["weights_sha256"] != _digest(folder / "weights.safetensors"):
                raise ResumeError(f"{folder / 'weights.safetensors'} is damaged: its checksum does not fit")
            tensors = load_file(folder / "weights.safetensors")
            ledger = read_books((folder / "ledger.bin").read_bytes(), structure)
            for layer in layers:
                for name, parameter in layer.module.named_parameters(recurse=False):
                    parameter.data.copy_(tensors[f"{layer.name}.{name}"])
            records = [ShotRecord(**record) for record in saved["shots"]]
        except ResumeError:
            raise
        except (OSError, KeyError, TypeError, ValueError, SafetensorError, SurgeonError) as error:
            raise ResumeError(
                f"the saved state in {folder} is damaged ({error}): delete {self.path} to start anew"
            ) from error
        return RunState(ledger, saved["dense_perplexity"], records)

    def finish(self) -> None:
        """Make the folder OUT, then drop the state: at any moment one of the two is complete."""
        self._finishing = True
        for path in self.path.iterdir():
            _sync(path)
        _sync(self.path)
        try:
            self.path.rename(self.out)  # an empty OUT is replaced, one with files is not
        except OSError as error:
            raise OutputError(
                f"cannot rename {self.path} to {self.out}: {error.strerror}; the result is complete in the former"
            ) from None
        _sync(self.out.parent)
        self.close()
        shutil.rmtree(self.out / "state")

    def _take_lock(self) -> None:
        lock = (self._state / "lock").open("w")
        if not _lock_file(lock):
            lock.close()
            raise OutputError(f"another process is at work on {self.path}")
        self._lock = lock

    def _check_fingerprint(self) -> None:
        try:
            saved = json.loads((self._state / "run.json").read_text(encoding="utf-8"))
            old = saved["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ResumeError(
                f"the saved state in {self._state} is damaged: delete {self.path} to start anew"
            ) from None
        wrong = [key for key, value in self._fingerprint.items() if old.get(key) != value]
        if wrong:
            raise ResumeError(
                f"the unfinished run in {self.path} differs in {', '.join(wrong)}: "
                "use its own settings, or delete that folder"
            )


def _lock_file(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _write_json(path: Path, value: Any) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(scratch)
    scratch.replace(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
