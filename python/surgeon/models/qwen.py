"""Qwen2 and Qwen2.5: LLaMA's layers, biases on q, k and v. Qwen3: norms on each head's q and k instead."""

from dataclasses import replace

from surgeon.models.base import register
from surgeon.models.llama import LLAMA

QWEN2 = register(replace(LLAMA, family="Qwen2", model_types=("qwen2",)))
QWEN3 = register(replace(LLAMA, family="Qwen3", model_types=("qwen3",)))
