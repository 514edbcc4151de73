"""The embedded models: real enough that methods rank on them as they must."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon
from surgeon import PruneConfig, runner
from surgeon.data import Windows
from surgeon.models import LoadedModel, load_model, load_tokenizer, match_layers
from surgeon.models.loading import EMBEDDED, resolve_model
from surgeon.session import Session
from surgeon.structures import parse_structure


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


GLOBAL = ("surgeon", "k-obd", "l-obd", "magnitude")
LAYERWISE = ("sparsegpt", "wanda")
COMBINATIONS = [
    *((structure, method) for structure in ("rows-columns", "rows", "columns") for method in GLOBAL),
    *((structure, method) for structure in ("neurons", "heads", "neurons,heads") for method in GLOBAL),
    *((structure, method) for structure in ("weights", "2:4", "4:8") for method in (*GLOBAL, *LAYERWISE)),
]


SMALL = {"samples": 4, "sequence_length": 64, "test_samples": 2, "shots": 1}


@functools.cache
def demo(name: str) -> tuple[LoadedModel, Windows, Windows]:
    """A demo model, loaded once, with a few windows."""
    config = PruneConfig(model=name, **SMALL)  # type: ignore[arg-type]
    loaded = load_model(name, device=torch.device("cpu"), precision=torch.float32)
    tokenizer = load_tokenizer(name)
    calibration = runner.calibration_set(config, loaded, tokenizer, 64)
    return loaded, calibration, runner.test_set(config.test_data, loaded, tokenizer, 64, 2)


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize(("structure", "method"), COMBINATIONS)
def test_every_structure_and_method_meets_its_target(name: str, structure: str, method: str) -> None:
    # Heads are about a quarter of the parameters; a pattern goes whole.
    pattern = parse_structure(structure).pattern
    sparsity = None if pattern is not None else 0.2 if structure == "heads" else 0.3
    config = PruneConfig(model=name, structure=structure, method=method, sparsity=sparsity, **SMALL)  # type: ignore[arg-type]
    loaded, calibration, test = demo(name)
    model = copy.deepcopy(loaded.model)
    run = Session(
        dataclasses.replace(loaded, model=model), match_layers(model), calibration=calibration, test=test, config=config
    )
    state = run.run()
    weights = [layer.read(torch.float32) for layer in run.layers]
    zeros = sum(int((W == 0).sum()) for W in weights)
    assert zeros == state.ledger.removed
    assert state.shots[0].perplexity is not None
    assert 1 < state.shots[0].perplexity < 3000
    if pattern is None:
        assert sparsity is not None
        assert sparsity <= state.ledger.sparsity < sparsity + 0.02
    else:
        for layer, W in zip(run.layers, weights, strict=True):
            kept = (W[:, : layer.inputs] != 0).reshape(layer.rows, -1, pattern.group).sum(-1)
            assert int(kept.max()) == pattern.keep
    if not parse_structure(structure).elementwise:
        for W in weights:  # whole rows and columns
            assert torch.equal(W == 0, (W == 0).all(1)[:, None] | (W == 0).all(0)[None, :])


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("method", [*GLOBAL, *LAYERWISE])
def test_patterns_hold_on_disk(name: str, method: str, tmp_path: Path) -> None:
    """What a kernel for 2:4 needs: two zeros in every four, in the file, in the file's own dtype."""
    surgeon.prune(PruneConfig(model=name, structure="2:4", method=method, **SMALL), tmp_path / "out")  # type: ignore[arg-type]
    report = json.loads((tmp_path / "out" / "surgeon.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report["layers"]:
        weight = tensors[f"{layer['name']}.weight"]
        assert weight.dtype == torch.bfloat16
        kept = (weight != 0).reshape(weight.shape[0], -1, 4).sum(-1)
        assert int(kept.max()) == 2
        assert not torch.signbit(weight[weight == 0]).any()
    assert report["final"]["sparsity"] > 0.49
