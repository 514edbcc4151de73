"""The folder of a run: refused if it holds somebody's files, built aside, renamed when finished.

While a run goes on everything is in ``OUT.partial/`` beside OUT: ``state/`` with what resume needs,
``events.jsonl``, and at the end the checkpoint. One rename makes it OUT, so that OUT is a finished
result or is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from typing import IO, TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from surgeon.errors import OutputError, ResumeError, SurgeonError
from surgeon.schedule import Ledger
from surgeon.session import RunState, ShotRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from surgeon.layers import PrunableLayer
    from surgeon.models import LoadedModel

STATE_VERSION = 1


def check_output(out: Path) -> None:
    """Refuse an OUT that holds anything, before anything heavy runs.

    Raises:
        OutputError: it is a file or a folder that is not empty, or its parent cannot be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} is not a folder: choose another -o")
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} holds files already: nothing was changed; choose another -o or move them away")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}")


def model_fingerprint(loaded: LoadedModel) -> str:
    """SHA-256 over names, shapes and a sample of the values of every parameter."""
    state = hashlib.sha256()
    for name, parameter in loaded.model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 4096)].to("cpu", torch.float64).numpy()
        state.update(f"{name}{tuple(parameter.shape)}{loaded.storage_dtype}".encode())
        state.update(sample.tobytes())
    return state.hexdigest()


class RunFolder:
    """``OUT.partial`` of one run, locked while it is open.

    Args:
        out: the folder that the finished run becomes.
        fingerprint: what must be equal for a resume: name → digest or value.
        resume: continue what is there, instead of refusing it.

    Raises:
        OutputError: OUT holds files, an unfinished run is there and ``resume`` is not set, or another
            process is at work on it.
        ResumeError: there is nothing to resume, or it is another run's.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], *, resume: bool) -> None:
        check_output(out)
        self.out = out.absolute()
        self.path = self.out.with_name(self.out.name + ".partial")
        self._state = self.path / "state"
        self._fingerprint = fingerprint
        self._lock: IO[str] | None = None
        unfinished = (self._state / "run.json").exists()
        if resume and not unfinished:
            raise ResumeError(f"there is no unfinished run to resume in {self.path}")
        if self.path.exists() and not resume:
            raise OutputError(
                f"an unfinished run is in {self.path}: add --resume to continue it, or delete that folder to start anew"
            )
        self._state.mkdir(parents=True, exist_ok=True)
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
        """Release the lock; a run without a finished shot leaves nothing behind."""
        self.close()
        if kind is not None and self.path.exists() and not list(self._state.glob("shot-*")):
            shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_shot(self, state: RunState, layers: Sequence[PrunableLayer]) -> None:
        """Save the weights of the prunable layers and the run's state, atomically.

        The shot before is removed once this one is complete.
        """
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

    def restore(self, layers: Sequence[PrunableLayer]) -> RunState | None:
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
            ledger = Ledger.from_bytes((folder / "ledger.bin").read_bytes())
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
        """Drop the state and make the folder OUT."""
        shutil.rmtree(self._state)
        self.close()
        for path in self.path.iterdir():
            _sync(path)
        try:
            self.path.rename(self.out)  # an empty OUT is replaced, one with files is not
        except OSError as error:
            raise OutputError(
                f"cannot rename {self.path} to {self.out}: {error.strerror}; the result is complete there"
            ) from None
        _sync(self.out.parent)

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
        import fcntl
    except ImportError:  # not a POSIX system: runs are not kept apart there
        return True
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
