"""Gemma 1 to 3, text: LLaMA's layers with GELU gates, heads wider than hidden size / heads, more norms."""

from dataclasses import replace

from surgeon.models.base import Mlp, register
from surgeon.models.llama import LLAMA

GEMMA = register(replace(LLAMA, family="Gemma", model_types=("gemma",)))
GEMMA2 = register(
    replace(
        LLAMA,
        family="Gemma",
        model_types=("gemma2", "gemma3_text"),
        mlp=Mlp(inner=("gate", "up"), output="down", activation="hidden_activation"),
    )
)
