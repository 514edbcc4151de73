"""Loading a causal language model and its tokenizer: a folder, a hub id, or a model inside the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.errors import ModelError, NoTokenizerError
from surgeon.models.base import adapter_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The names that mean a model inside the package.
EMBEDDED = ("demo", "demo-opt")


def precision_dtype(name: str) -> torch.dtype:
    """The dtype of a :data:`surgeon.config.PRECISIONS` name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


# Keys that old checkpoints carry and that nothing reads: they are computed.
_COMPUTED = ("rotary_emb.inv_freq", "attn.masked_bias")

# One of these has to be beside a local checkpoint for it to have a tokenizer. Without the check,
# transformers makes up an empty one for some families.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    """A live model and what is needed to write it back as it was found.

    Attributes:
        model: in the run's precision, on the run's device, in eval mode, weights frozen.
        storage_dtype: the checkpoint's own dtype, in which results are written.
        source: the folder or hub id that it came from.
    """

    model: PreTrainedModel
    storage_dtype: torch.dtype
    source: str


def resolve_model(name: str) -> str:
    """Folder or hub id for a MODEL argument.

    Raises:
        ModelError: it looks like a path and there is no checkpoint.
    """
    if name in EMBEDDED:
        return str(resources.files("surgeon") / "assets" / name)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} holds no config.json: it is not a Hugging Face checkpoint")
        return name
    if path.exists():
        raise ModelError(f"{name} is a file: give the checkpoint's folder")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ModelError(f"there is no checkpoint folder {name!r}")
    return name


def load_model(name: str, *, device: torch.device, precision: torch.dtype) -> LoadedModel:
    """Load a causal language model for pruning or evaluation.

    The family is checked on the configuration alone, before any weight is read.

    Raises:
        ModelError: missing, corrupt, of an unsupported family or with non-finite weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source)
        adapter_for(config)
        # Straight into the run's precision where the checkpoint says its own: no second copy.
        stated = getattr(config, "dtype", None)
        # Missing weights would be initialised at random and only warned about: ask for the list.
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=precision if isinstance(stated, torch.dtype) else "auto", output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    model: PreTrainedModel = found[0]
    info: dict[str, Any] = found[1]
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        keys = sorted(key for key in map(str, info.get(kind) or ()) if not key.endswith(_COMPUTED))
        if keys:
            raise ModelError(
                f"the checkpoint {name!r} does not fit its configuration: "
                f"{len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])})"
            )
    storage_dtype = stated if isinstance(stated, torch.dtype) else model.dtype
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"the checkpoint {name!r} has non-finite weights in {key}")
    model.to(device=device, dtype=precision)  # type: ignore[call-arg]
    model.eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(requires_grad=False)
    return LoadedModel(model, storage_dtype, source)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        NoTokenizerError: a local folder holds none.
        ModelError: it cannot be read.
    """
    from transformers import AutoTokenizer

    source = resolve_model(name)
    if Path(source).is_dir() and not any((Path(source) / file).is_file() for file in _TOKENIZER_FILES):
        raise NoTokenizerError(
            f"{name} holds no tokenizer: put its tokenizer.json there, or give tokens as .safetensors"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer of {name!r}: {_first_line(error)}") from error
    return tokenizer


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
