"""Gemma 1 to 3, text: LLaMA's layers with GELU gates, heads wider than hidden size / heads, more norms."""

from dataclasses import replace

from surgeon.models.base import register
from surgeon.models.llama import LLAMA

GEMMA = register(replace(LLAMA, family="Gemma", model_types=("gemma", "gemma2", "gemma3_text")))
