"""The embedded models: real enough that methods rank on them as they must."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon
from surgeon import PruneConfig
from surgeon.models.loading import EMBEDDED, resolve_model


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_load_in_stock_transformers(name: str) -> None:
    folder = resolve_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) <= model.config.vocab_size
    assert sum(path.stat().st_size for path in Path(folder).iterdir()) < 6_000_000
    text = "Aristotle was a Greek philosopher.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", EMBEDDED)
def test_methods_rank_as_they_must(name: str, tmp_path: Path) -> None:
    """The surgeon's update below K-OBD below magnitude, on the same windows, at the same sparsity."""
    perplexity: dict[str, float] = {}
    for method in ("magnitude", "k-obd", "surgeon"):
        config = PruneConfig(
            model=name, method=method, sparsity=0.4, shots=2, samples=24, sequence_length=128, test_samples=48
        )
        report = surgeon.prune(config, tmp_path / method).report
        assert report["final"]["sparsity"] >= 0.4
        perplexity[method] = report["final"]["perplexity"]
        perplexity["dense"] = report["dense"]["perplexity"]
    shown = json.dumps(perplexity)
    damage = {method: math.log(value / perplexity["dense"]) for method, value in perplexity.items()}
    assert perplexity["dense"] < 120, shown
    assert 0 < damage["surgeon"] < 0.85 * damage["k-obd"], shown
    assert damage["k-obd"] < 0.5 * damage["magnitude"], shown
