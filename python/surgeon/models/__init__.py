"""Model families: one file each, found by ``config.model_type``."""

from surgeon.models.base import Adapter, Matched, adapter_for, match_layers, register, supported_model_types
from surgeon.models.llama import LLAMA
from surgeon.models.loading import LoadedModel, load_model, load_tokenizer, precision_dtype
from surgeon.models.opt import OPT

__all__ = [
    "LLAMA",
    "OPT",
    "Adapter",
    "LoadedModel",
    "Matched",
    "adapter_for",
    "load_model",
    "load_tokenizer",
    "match_layers",
    "precision_dtype",
    "register",
    "supported_model_types",
]
