"""Writing a model as a plain Hugging Face checkpoint in its own dtype."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from surgeon.errors import NonFiniteError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from surgeon.models import LoadedModel


@torch.no_grad()
def round_to_storage(loaded: LoadedModel) -> bool:
    """Round every parameter to the checkpoint's dtype, staying in the run's precision.

    After this the live model is exactly what the checkpoint will hold, so that what is measured is
    what is written.

    Returns:
        Whether any rounding was to be done at all.

    Raises:
        NonFiniteError: a weight overflows the dtype.
    """
    if loaded.storage_dtype == loaded.model.dtype:
        return False
    for name, parameter in loaded.model.named_parameters():
        rounded = parameter.to(loaded.storage_dtype)
        if not torch.isfinite(rounded).all():
            layer = name.rpartition(".")[0]
            raise NonFiniteError(
                f"a weight of layer {layer} overflows the checkpoint's {loaded.storage_dtype}", layer=layer
            )
        parameter.copy_(rounded + 0.0)  # a small negative weight may have become -0.0
    return True


def write_checkpoint(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> int:
    """Write config, safetensors, generation config and tokenizer; the live model ends in that dtype.

    Returns:
        Bytes of the weights on disk.
    """
    loaded.model.to(loaded.storage_dtype)  # type: ignore[arg-type]
    loaded.model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    weights = list(folder.glob("*.safetensors"))
    umask = os.umask(0)
    os.umask(umask)
    for path in weights:  # some versions of safetensors write files that only their owner can read
        path.chmod(0o666 & ~umask)
    return sum(path.stat().st_size for path in weights)
