"""Output folder, state, resume and what is written to disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import surgeon
from surgeon import PruneConfig
from surgeon.checkpoint import RunFolder
from surgeon.errors import OutputError, ResumeError
from surgeon.progress import Observer


def settings(checkpoint: Path, tokens: Path, **changes: object) -> PruneConfig:
    values: dict[str, object] = {
        "model": str(checkpoint),
        "calibration": str(tokens),
        "test_data": str(tokens),
        "samples": 6,
        "sequence_length": 16,
        "shots": 4,
        **changes,
    }
    return PruneConfig(**values)  # type: ignore[arg-type]


class StopAfter(Observer):
    """Ends the process' work, as a signal would, after some shots."""

    def __init__(self, shots: int) -> None:
        self.left = shots

    def shot_done(self, record: dict[str, object]) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checkpoint_keeps_its_dtype_and_loads_in_stock_transformers(
    tiny: PreTrainedModel, tmp_path: Path, tokens_file: Path, dtype: torch.dtype
) -> None:
    tiny.to(dtype).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    result = surgeon.prune(settings(tmp_path / "model", tokens_file), out)
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {dtype}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == dtype
    assert type(model) is type(tiny)
    report = json.loads((out / "surgeon.json").read_text())
    assert report == result.report
    zeros = 0
    for layer in report["layers"]:
        module = model.get_submodule(layer["name"])
        zero_rows = (module.weight == 0).all(1)
        if module.bias is not None:
            zero_rows &= module.bias == 0
        assert int((~zero_rows).sum()) <= layer["kept_rows"]
        zeros += int((module.weight == 0).sum()) + (0 if module.bias is None else int((module.bias == 0).sum()))
    assert zeros >= report["final"]["removed_parameters"]
    again, _ = surgeon.evaluate(str(out), data_source=str(tokens_file), sequence_length=16)
    assert again.perplexity == pytest.approx(report["final"]["perplexity"], rel=1e-6)
    assert report["config"]["sequence_length"] == 16
    assert not (out / "state").exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"structure": "neurons,heads"},
        {"structure": "weights"},
        {"structure": "2:4", "heal": True, "correction_epochs": 0.5},
        {"structure": "weights", "method": "wanda"},
        {"curvature": "kron", "fisher": "mc", "rounds": 2},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_of_run_resumes_to_the_same_bits(
    changes: dict[str, object], checkpoint: Path, tmp_path: Path, tokens_file: Path
) -> None:
    config = settings(checkpoint, tokens_file, **{"shots": 2, **changes})
    whole = surgeon.prune(config, tmp_path / "whole").report
    with pytest.raises(KeyboardInterrupt):
        surgeon.prune(config, tmp_path / "out", observer=StopAfter(1))
    again = surgeon.prune(config, tmp_path / "out", resume=True).report
    assert again["layers"] == whole["layers"]
    assert again["final"]["perplexity"] == whole["final"]["perplexity"]
    names = {"model.safetensors"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("structure", ["rows-columns", "neurons,heads", "weights", "2:4"])
def test_healing_changes_no_zero(structure: str, checkpoint: Path, tmp_path: Path) -> None:
    """Adapters are merged into what stands; what went stays +0.0, and the run says what the fit did."""
    learnable = tmp_path / "learnable.safetensors"
    save_file({"tokens": torch.arange(1000) * 7 % 97}, learnable)
    config = settings(checkpoint, learnable, structure=structure, shots=1, samples=16)
    surgeon.prune(config, tmp_path / "plain")
    config = dataclasses.replace(config, heal=True, heal_epochs=3.0, lora_learning_rate=1e-2)
    report = surgeon.prune(config, tmp_path / "healed").report
    record = report["shots"][-1]["heal"]
    assert record["steps"] > 0
    plain, healed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "healed"))
    changed = 0
    for layer in report["layers"]:
        name = layer["name"] + ".weight"
        assert torch.equal(plain[name] == 0, healed[name] == 0)
        assert not torch.signbit(healed[name][healed[name] == 0]).any()
        changed += int((plain[name] != healed[name]).sum())
    assert record["kept"]
    assert changed
    assert record["loss_after"] < record["loss_before"]


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_stopped_run_resumes_to_the_same_bits(
    checkpoint: Path, tmp_path: Path, tokens_file: Path, after: int
) -> None:
    config = settings(checkpoint, tokens_file)
    surgeon.prune(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        surgeon.prune(config, tmp_path / "cut", observer=StopAfter(after))
    assert not (tmp_path / "cut").exists()
    with pytest.raises(OutputError, match="add --resume"):
        surgeon.prune(config, tmp_path / "cut")
    result = surgeon.prune(config, tmp_path / "cut", resume=True)
    one, two = load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "cut/model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    whole = json.loads((tmp_path / "whole/surgeon.json").read_text())
    for a, b in zip(whole["shots"], result.report["shots"], strict=True):
        for key in ("sparsity", "threshold", "perplexity", "loss_before", "loss_after", "predicted_loss_increase"):
            assert a[key] == b[key], key


def test_a_run_stopped_before_its_first_shot_leaves_nothing(
    checkpoint: Path, tmp_path: Path, tokens_file: Path
) -> None:
    class Stop(Observer):
        def dense(self, perplexity: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out", observer=Stop())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "tokens.safetensors"]


@pytest.fixture
def stopped(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> PruneConfig:
    config = settings(checkpoint, tokens_file)
    with pytest.raises(KeyboardInterrupt):
        surgeon.prune(config, tmp_path / "out", observer=StopAfter(2))
    return config


def test_resume_of_another_run_is_refused(
    stopped: PruneConfig, tmp_path: Path, checkpoint: Path, tokens_file: Path
) -> None:
    with pytest.raises(ResumeError, match="differs in settings"):
        surgeon.prune(settings(checkpoint, tokens_file, sparsity=0.5), tmp_path / "out", resume=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    model.save_pretrained(checkpoint)
    with pytest.raises(ResumeError, match="differs in model"):
        surgeon.prune(stopped, tmp_path / "out", resume=True)


def test_resume_on_another_batch_size_is_fine(stopped: PruneConfig, tmp_path: Path) -> None:
    import dataclasses

    assert surgeon.prune(dataclasses.replace(stopped, batch_tokens=16), tmp_path / "out", resume=True)


def test_nothing_to_resume(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    with pytest.raises(ResumeError, match="no unfinished run"):
        surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out", resume=True)


@pytest.mark.parametrize("victim", ["weights.safetensors", "ledger.bin", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_state_is_refused(stopped: PruneConfig, tmp_path: Path, victim: str, damage: str) -> None:
    path = next((tmp_path / "out.partial/state").glob("shot-*")) / victim
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) - 5
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :])
    with pytest.raises(ResumeError, match="damaged"):
        surgeon.prune(stopped, tmp_path / "out", resume=True)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out", {}, resume=False), pytest.raises(OutputError, match="another process"):
        RunFolder(tmp_path / "out", {}, resume=True)


def test_somebodys_files_are_never_touched(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="holds files already"):
        surgeon.prune(settings(checkpoint, tokens_file), out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        surgeon.prune(settings(checkpoint, tokens_file), file)


def test_an_empty_folder_may_be_the_output(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    (tmp_path / "out").mkdir()
    surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out")
    assert (tmp_path / "out/config.json").exists()


def test_a_finished_run_survives_a_failing_last_step(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    class Intruder(Observer):
        def run_done(self, facts: dict[str, object]) -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="complete in the former"):
        surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out", observer=Intruder())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out.partial") is not None
    # And the same command finishes it once the way is free.
    (tmp_path / "out" / "notes.txt").unlink()
    surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "surgeon.json").exists()
    assert not (tmp_path / "out" / "state").exists()


def test_a_run_killed_before_it_began_is_no_obstacle(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    (tmp_path / "out.partial" / "state").mkdir(parents=True)
    (tmp_path / "out.partial" / "state" / "lock").touch()
    assert surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out")


def test_a_folder_in_the_way_is_not_called_a_run(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").touch()
    with pytest.raises(OutputError, match="is in the way and is no run"):
        surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out")
    assert (tmp_path / "out.partial" / "notes").exists()


def test_a_pruned_checkpoint_can_be_pruned_again(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    surgeon.prune(settings(checkpoint, tokens_file, sparsity=0.9), tmp_path / "once")
    again = surgeon.prune(settings(tmp_path / "once", tokens_file, sparsity=0.95), tmp_path / "twice").report
    assert again["final"]["sparsity"] >= 0.95
    assert again["shots"][0]["sparsity"] >= 0.9


def test_others_can_read_the_weights(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    surgeon.prune(settings(checkpoint, tokens_file), str(tmp_path / "out"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["surgeon.json"], modes


def test_the_report_has_the_contracts_fields(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    report = surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out").report
    assert report["schema_version"] == 1
    assert {"config", "environment", "protocol", "dense", "shots", "layers", "final"} <= report.keys()
    assert set(report["dense"]) == {"perplexity"}
    for shot in report["shots"]:
        assert set(shot) == {
            *("shot", "target_sparsity", "sparsity", "units", "threshold", "predicted_loss_increase", "loss_before"),
            *("loss_after", "perplexity", "seconds", "peak_memory_bytes", "damping_events", "heal"),
        }
        assert set(shot["seconds"]) == {"curvature", "costs", "select", "update", "evaluate", "save"}
        assert shot["loss_after"] is not None
        assert shot["peak_memory_bytes"] > 1e7
    for layer in report["layers"]:
        assert set(layer) == {"name", "shape", "sparsity", "kept_rows", "kept_columns"}
        assert layer["kept_rows"] <= layer["shape"][0]
    final = report["final"]
    assert final["kept_parameters"] == final["parameters"] - final["removed_parameters"]
    assert final["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert report["protocol"]["test"]["windows"] == 62


def test_events_tell_the_run(checkpoint: Path, tmp_path: Path, tokens_file: Path) -> None:
    surgeon.prune(settings(checkpoint, tokens_file), tmp_path / "out")
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_done")
    assert kinds.count("shot_done") == 4
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
