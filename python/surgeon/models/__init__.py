"""Model families: one file each, found by ``config.model_type``."""

from surgeon.models.base import (
    Adapter,
    Attention,
    Matched,
    Mlp,
    adapter_for,
    match_layers,
    register,
    supported_model_types,
)
from surgeon.models.gemma import GEMMA, GEMMA2
from surgeon.models.gpt2 import GPT2
from surgeon.models.gpt_neox import GPT_NEOX
from surgeon.models.llama import LLAMA
from surgeon.models.loading import LoadedModel, load_model, load_tokenizer, precision_dtype
from surgeon.models.mistral import MISTRAL
from surgeon.models.opt import OPT
from surgeon.models.phi import PHI
from surgeon.models.phi3 import PHI3
from surgeon.models.qwen import QWEN2, QWEN3
from surgeon.models.units import UnitGroup, unit_groups

__all__ = [
    "GEMMA",
    "GEMMA2",
    "GPT2",
    "GPT_NEOX",
    "LLAMA",
    "MISTRAL",
    "OPT",
    "PHI",
    "PHI3",
    "QWEN2",
    "QWEN3",
    "Adapter",
    "Attention",
    "LoadedModel",
    "Matched",
    "Mlp",
    "UnitGroup",
    "adapter_for",
    "load_model",
    "load_tokenizer",
    "match_layers",
    "precision_dtype",
    "register",
    "supported_model_types",
    "unit_groups",
]
