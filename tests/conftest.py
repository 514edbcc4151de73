"""Tiny random models and small tensors that every test may use."""

from __future__ import annotations

import os

# As on the command line: no bars of the libraries. Read when they are imported.
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
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
