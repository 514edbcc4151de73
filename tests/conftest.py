"""Tiny random models and small tensors that every test may use."""

from __future__ import annotations

import os

# As on the command line: no bars of the libraries. Read when they are imported.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 97

# Tiny products: threads only get in each other's way, worst where cores are busy.
torch.set_num_threads(1)


def tiny_llama(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        init_std=0.3,
    )
    model = OPTForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


TINY: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny_llama, "opt": tiny_opt}

_SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED: dict[str, object] = {**_SIZES, "num_key_value_heads": 2}
_WIDE: dict[str, object] = {**_GROUPED, "head_dim": 6}  # heads times their width is not the hidden size
_SOFT: dict[str, object] = {"query_pre_attn_scalar": 6, "final_logit_softcapping": 5.0, "sliding_window": 8}

# Settings of a tiny model of each model type, as different from each other as the types allow.
_SETTINGS: dict[str, dict[str, object]] = {
    "mistral": {**_WIDE, "sliding_window": 8},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": _WIDE,
    "gemma": _WIDE,
    "gemma2": {**_WIDE, **_SOFT, "attn_logit_softcapping": 10.0},
    "gemma3_text": {**_WIDE, **_SOFT, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": _GROUPED,
    "phi3": _GROUPED,
    "gpt2": {**_SIZES, "n_inner": 24},
    "gpt_neox": _SIZES,
}


def tiny_of(model_type: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A tiny random model of a model type, its biases random too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_SETTINGS[model_type], **settings})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **TINY,
    **{model_type: partial(tiny_of, model_type) for model_type in _SETTINGS},
}


@pytest.fixture(params=sorted(TINY))
def tiny(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each family."""
    return TINY[request.param]()


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    """A thousand tokens with some structure, as a safetensors file."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (1000,), generator=generator)
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": tokens}, path)
    return path


@pytest.fixture
def checkpoint(tiny: PreTrainedModel, tmp_path: Path) -> Path:
    """A tiny model on disk, without a tokenizer."""
    folder = tmp_path / "model"
    tiny.save_pretrained(folder)
    return folder


def spd(n: int, generator: torch.Generator, *, rank: int | None = None) -> torch.Tensor:
    """A random second moment ``[n, n]`` in float64."""
    X = torch.randn(rank or 3 * n, n, generator=generator, dtype=torch.float64)
    return X.T @ X / X.shape[0]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters over the tiny models' vocabulary."""
    characters = [chr(c) for c in range(32, 32 + VOCABULARY - 3)] + ["\n", "\t", "<unk>"]
    inner = Tokenizer(WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
