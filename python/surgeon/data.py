"""Calibration and test windows: local files first, hub data sets for those who have the hub.

Windows are a function of (text, tokenizer, seed, n, length) and of nothing else; their digest goes
into the report, so that two runs can be seen to have read the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet", ".safetensors")

# Name → (hub repository, configuration, text column, data files a split or None).
HUB_DATA: dict[str, tuple[str, str | None, str, dict[str, str] | None]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text", None),
    "c4": (
        "allenai/c4",
        None,
        "text",
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "test": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}


@dataclass(frozen=True)
class Batch:
    """Consecutive windows.

    Attributes:
        ids: ``[B, T]`` int64 token ids.
        mask: ``[B, T]`` bool, False where padded; None if nothing is.
        first: index of the first window.
    """

    ids: Tensor
    mask: Tensor | None
    first: int


@dataclass(frozen=True)
class Windows:
    """Token windows of one length.

    Attributes:
        ids: ``[n, T]`` int64.
        mask: ``[n, T]`` bool, False where padded; None if nothing is.
        source: what they were cut from, for the protocol.
    """

    ids: Tensor
    source: str
    mask: Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        """T, tokens a window."""
        return int(self.ids.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of shape, ids and mask."""
        state = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        state.update(self.ids.contiguous().numpy().astype("<i8").tobytes())
        if self.mask is not None:
            state.update(self.mask.contiguous().numpy().tobytes())
        return state.hexdigest()

    def batches(self, batch_tokens: int) -> Iterator[Batch]:
        """Consecutive batches of about ``batch_tokens`` tokens, at least one window each."""
        size = max(1, batch_tokens // self.length)
        for first in range(0, len(self), size):
            mask = None if self.mask is None else self.mask[first : first + size]
            yield Batch(self.ids[first : first + size], mask, first)

    def check_vocabulary(self, size: int) -> None:
        """Refuse ids that the model's embedding does not have.

        Raises:
            DataError: an id is negative or not below ``size``.
        """
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise DataError(
                f"{self.source} holds token {bad}, the model's vocabulary has {size}: it is not its tokenizer's"
            )


def token_ids(source: str, split: str, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """All token ids of a text as one sequence, ``[N]`` int64.

    Args:
        source: DATA as on the command line.
        split: ``train`` or ``test``; local files have none and ignore it.
        tokenizer: not needed for ``.safetensors``, which hold tokens.

    Raises:
        DataError: unknown, unreadable or empty.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        return _read_tokens(path)
    text = _read_text(source, split)
    if not text.strip():
        raise DataError(f"{source} is empty: there is no text in it")
    if tokenizer is None:
        raise DataError(f"{source} is text and the model has no tokenizer: give tokens as .safetensors")
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_windows(ids_N: Tensor, *, source: str, samples: int, length: int, seed: int) -> Windows:
    """``samples`` windows at random, distinct starts.

    Starts are ``random.Random(seed).sample(range(N − length), samples)``.

    Raises:
        DataError: the text is too short.
    """
    places = ids_N.numel() - length
    if places < samples:
        raise DataError(
            f"{source} is too short: {ids_N.numel()} tokens hold no {samples} distinct windows of {length} "
            f"(lower --samples or --sequence-length, or give more text)"
        )
    starts = random.Random(seed).sample(range(places), samples)  # noqa: S311 - reproducible, not secret
    return Windows(torch.stack([ids_N[start : start + length] for start in starts]), source)


def test_windows(ids_N: Tensor, *, source: str, length: int, samples: int | None) -> Windows:
    """Non-overlapping windows from the start of the text; a shorter rest is left out.

    Raises:
        DataError: the text holds no window, or fewer than asked for.
    """
    count = ids_N.numel() // length
    wanted = count if samples is None else samples
    if count < max(wanted, 1):
        raise DataError(
            f"{source} is too short: {ids_N.numel()} tokens are {count} windows of {length}, {max(wanted, 1)} needed"
        )
    return Windows(ids_N[: wanted * length].reshape(wanted, length), source)


def _read_tokens(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _must_exist(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a readable safetensors file: {error}") from None
    chosen = next((tensors[key] for key in ("tokens", "input_ids") if key in tensors), None)
    if chosen is None and len(tensors) == 1:
        chosen = next(iter(tensors.values()))
    if chosen is None or chosen.is_floating_point() or chosen.numel() == 0:
        raise DataError(f"{path} holds no integer tensor named 'tokens' or 'input_ids'")
    return chosen.to(torch.int64).flatten()


def _read_text(source: str, split: str) -> str:
    path = Path(source)
    if source == "wiki-mini":
        return (resources.files("surgeon") / "assets" / "wiki-mini" / f"{split}.txt").read_text(encoding="utf-8")
    if source in HUB_DATA or source.startswith("hub:"):
        return _read_hub(source, split)
    if path.suffix not in LOCAL_SUFFIXES:
        names = ", ".join(["wiki-mini", *HUB_DATA, "hub:NAME[:CONFIG][:COLUMN]"])
        raise DataError(f"unknown data {source!r}: give {names}, or a local file ending in {', '.join(LOCAL_SUFFIXES)}")
    _must_exist(path)
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path} as UTF-8 text: {error}") from None
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> str:
    texts: list[str] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:  # not JSON, or not UTF-8
                raise DataError(f"{path}, line {number}: not JSON") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{path}, line {number}: there is no string under 'text'")
            texts.append(text)
    return "\n\n".join(texts)


def _read_parquet(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None
    if "text" not in table.column_names:
        raise DataError(f"{path} has no column 'text': it has {', '.join(table.column_names)}")
    return "\n\n".join(str(value) for value in table.column("text").to_pylist() if value is not None)


def parse_hub(source: str) -> tuple[str, str | None, str, dict[str, str] | None]:
    """``(repository, configuration, column, data files)`` of a named or ``hub:`` data set.

    Raises:
        DataError: it does not parse.
    """
    if source in HUB_DATA:
        return HUB_DATA[source]
    parts = source.removeprefix("hub:").split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"{source!r} is not hub:NAME[:CONFIG][:COLUMN]")
    configuration = parts[1] if len(parts) > 1 and parts[1] else None
    return parts[0], configuration, parts[2] if len(parts) > 2 else "text", None


def _read_hub(source: str, split: str) -> str:
    import datasets

    repository, configuration, column, files = parse_hub(source)
    arguments: dict[str, Any] = {"split": split}
    if files is not None:
        arguments["data_files"] = files
    try:
        data = datasets.load_dataset(repository, configuration, **arguments)
        texts = data[column]
    except KeyError:
        raise DataError(f"{source} has no column {column!r}") from None
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot load {source} from the data hub ({first[:200]}); a local .txt, .jsonl or .parquet works without it"
        ) from error
    return "\n\n".join(str(text) for text in texts if text is not None)


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"there is no file {path}")
