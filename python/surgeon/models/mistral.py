"""Mistral: LLaMA's layers without biases, attention in a sliding window."""

from dataclasses import replace

from surgeon.models.base import register
from surgeon.models.llama import LLAMA

MISTRAL = register(replace(LLAMA, family="Mistral", model_types=("mistral",)))
