"""The command line as a person meets it: results on stdout, one clear line for a mistake, nothing overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from surgeon import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["surgeon", *map(str, arguments)])
        capsys.readouterr()  # what making the model printed
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL = ("--samples", 6, "--sequence-length", 16, "--shots", 2)


def with_data(tokens: Path) -> tuple[object, ...]:
    return (*SMALL, "--calibration", tokens, "--test-data", tokens)


def test_prune_then_evaluate(run: Run, checkpoint: Path, tokens_file: Path) -> None:
    code, out, err = run("prune", checkpoint, "-o", "pruned", "--sparsity", 0.25, *with_data(tokens_file))
    assert code == 0, err
    assert "pruned model: pruned" in out
    assert "surgeon.json" in out
    assert "protocol: " in out
    assert "shot 2/2" in err
    assert "shot" not in out.splitlines()[0]
    report = json.loads(Path("pruned/surgeon.json").read_text())
    assert 0.25 <= report["final"]["sparsity"] < 0.28
    code, out, _ = run("evaluate", checkpoint, "pruned", "--data", tokens_file, "--sequence-length", 16, "--json")
    assert code == 0
    results = json.loads(out)["results"]
    assert [r["model"] for r in results] == [str(checkpoint), "pruned"]
    assert results[1]["perplexity"] == pytest.approx(report["final"]["perplexity"], rel=1e-6)
    assert results[0]["perplexity"] == pytest.approx(report["dense"]["perplexity"], rel=1e-6)


def test_config_file_and_options(run: Run, checkpoint: Path, tokens_file: Path) -> None:
    Path("run.toml").write_text(
        f'model = "{checkpoint}"\nsparsity = 0.5\nshots = 1\nsamples = 6\nsequence-length = 16\n'
        f'calibration = "{tokens_file}"\ntest-data = "{tokens_file}"\nmethod = "magnitude"\n'
    )
    code, out, err = run("prune", "-o", "pruned", "--config", "run.toml", "--sparsity", 0.2, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["config"]["method"] == "magnitude"
    assert report["config"]["sparsity"] == 0.2


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[3]
    tensors[key].view(-1)[5] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(key for key in sorted(tensors) if "q_proj.weight" in key))
    save_file(tensors, path, {"format": "pt"})


def add_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.surprise"] = torch.zeros(3)
    save_file(tensors, path, {"format": "pt"})


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{ nope")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, "cannot load the model"),
        (not_a_number, "non-finite weights in"),
        (drop_a_tensor, "1 missing keys"),
        (add_a_tensor, "1 unexpected keys (model.surprise)"),
        (other_family, "models of type 'bert' are not supported; supported are:"),
        (broken_config, "cannot load the model"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    run: Run, checkpoint: Path, tokens_file: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    code, out, err = run("prune", checkpoint, "-o", "pruned", *with_data(tokens_file))
    check_refusal(code, out, err, message)
    assert not Path("pruned").exists()
    assert not Path("pruned.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "1.5"), "sparsity is 1.5"),
        (("--sparsity", "-0.1"), "sparsity is -0.1"),
        (("--sparsity", "nan"), "sparsity is nan"),
        (("--sparsity", "half"), "Invalid value for '--sparsity'"),
        (("--shots", "2000000"), "at most 10000"),
        (("--sparsity", "0.1", "--target-size", "1GB"), "say the same in different ways"),
        (("--structure", "everything"), "unknown structure 'everything': choose one of rows-columns, rows, columns"),
        (("--method", "hope"), "unknown method 'hope'"),
        (("--shots", "0"), "shots is 0"),
        (("--samples", "0"), "samples is 0"),
        (("--samples", "100000"), "too short"),
        (("--sequence-length", "1"), "sequence-length is 1"),
        (("--sequence-length", "65"), "at most 64 positions"),
        (("--test-samples", "1000"), "too short"),
        (("--seed", "-4"), "seed is -4"),
        (("--device", "toaster"), "unknown device 'toaster'"),
        (("--device", "mps"), "not supported"),
        (("--precision", "float8"), "unknown precision 'float8'"),
        (("--damping-a", "-1"), "damping-a is -1.0"),
        (("--target-parameters", "lots"), "target-parameters is 'lots'"),
        (("--target-parameters", "1e12"), "fewer than"),
        (("--target-size", "1 furlong"), "is no size"),
        (("--target-size", "1GB", "--target-parameters", "5"), "give one"),
        (("--calibration", "no-such.txt"), "no file no-such.txt"),
        (("--calibration", "no-such-name"), "unknown data 'no-such-name'"),
        (("--calibration", "empty.txt"), "empty"),
        (("--test-data", "short.txt"), "too short"),
        (("--config", "missing.toml"), "cannot read the configuration missing.toml"),
        (("--resume",), "no unfinished run to resume"),
        (("--no-such-option",), "No such option: --no-such-option"),
        (("-o", "nul\0byte"), "embedded null byte"),
        (("-o", "x" * 300), "cannot be the output"),
    ],
)
def test_wrong_use_is_one_line(
    run: Run, tiny_demo: Path, tokens_file: Path, arguments: tuple[str, ...], message: str
) -> None:
    Path("empty.txt").write_text("  \n")
    Path("short.txt").write_text("a b c")
    code, out, err = run("prune", tiny_demo, "-o", "pruned", *with_data(tokens_file), *arguments)
    check_refusal(code, out, err, message)
    assert not Path("pruned").exists()
    assert not Path("pruned.partial").exists()


@pytest.fixture
def tiny_demo(checkpoint_llama: Path) -> Path:
    return checkpoint_llama


@pytest.fixture
def checkpoint_llama(tmp_path: Path) -> Path:
    """A tiny LLaMA with a tokenizer beside it."""
    from tests.conftest import tiny_llama, word_tokenizer

    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def check_refusal(code: int, out: str, err: str, message: str) -> None:
    assert code == 2, (code, err)
    assert out == ""
    assert message in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("surgeon: error: ")


@pytest.mark.parametrize("name", ["./nothing-here", "/nowhere/at/all", "~/x", "a/b/c"])
def test_a_missing_model_is_one_line(run: Run, tokens_file: Path, name: str) -> None:
    code, out, err = run("prune", name, "-o", "pruned", *with_data(tokens_file))
    check_refusal(code, out, err, "there is no checkpoint folder")


def test_an_output_with_somebodys_files_is_left_alone(run: Run, checkpoint: Path, tokens_file: Path) -> None:
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    code, out, err = run("prune", checkpoint, "-o", "mine", *with_data(tokens_file))
    check_refusal(code, out, err, "mine holds files already")
    assert Path("mine/notes.txt").read_text() == "keep me"
    assert len(list(Path("mine").iterdir())) == 1


def test_a_non_finite_activation_ends_the_run(
    run: Run, tiny: PreTrainedModel, tmp_path: Path, tokens_file: Path
) -> None:
    """Finite weights whose product overflows: found where it arises, with layer and window."""
    with torch.no_grad():
        for name, parameter in tiny.named_parameters():
            if name.endswith(("q_proj.weight", "gate_proj.weight", "fc1.weight", "up_proj.weight", "norm.weight")):
                parameter.fill_(3e38)
    tiny.save_pretrained(tmp_path / "huge")
    code, out, err = run("prune", "huge", "-o", "pruned", *with_data(tokens_file))
    assert code == 1
    assert out == ""
    assert "is not finite" in err
    assert "Traceback" not in err
    assert not Path("pruned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sequence-length", 1), "sequence-length is 1"),
        (("--sequence-length", 0), "sequence-length is 0"),
        (("--test-samples", 0), "test-samples is 0"),
        (("--test-samples", -3), "test-samples is -3"),
        (("--precision", "int4"), "unknown precision 'int4'"),
        (("--data", "nothing.txt"), "no file nothing.txt"),
    ],
)
def test_evaluate_checks_its_numbers(run: Run, tiny_demo: Path, arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run("evaluate", tiny_demo, *arguments)
    check_refusal(code, out, err, message)


def test_text_needs_a_tokenizer_and_none_is_made_up(run: Run, checkpoint: Path, tokens_file: Path) -> None:
    code, out, err = run("prune", checkpoint, "-o", "pruned", *SMALL)
    check_refusal(code, out, err, "holds no tokenizer")
    code, _, err = run("prune", checkpoint, "-o", "pruned", *with_data(tokens_file))
    assert code == 0, err
    assert not list(Path("pruned").glob("*token*"))
    (checkpoint / "tokenizer.json").write_text("{ nope")
    code, out, err = run("prune", checkpoint, "-o", "again", *with_data(tokens_file))
    check_refusal(code, out, err, "cannot load the tokenizer")


def test_a_missing_output_is_one_line(run: Run, checkpoint: Path) -> None:
    code, out, err = run("prune", checkpoint)
    check_refusal(code, out, err, "--out")


def test_an_option_wins_over_the_files_budget(run: Run, checkpoint: Path, tokens_file: Path) -> None:
    Path("run.toml").write_text("target-parameters = 5000\n")
    code, out, err = run(
        "prune",
        checkpoint,
        "-o",
        "pruned",
        "--config",
        "run.toml",
        "--sparsity",
        0.5,
        "--json",
        *with_data(tokens_file),
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["config"]["target_parameters"] is None
    assert report["final"]["sparsity"] >= 0.5
    code, out, err = run("prune", checkpoint, "-o", "other", "--config", "run.toml", "--json", *with_data(tokens_file))
    assert json.loads(out)["final"]["kept_parameters"] <= 5000


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_says_what_to_do(
    run: Run, checkpoint: Path, tokens_file: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from surgeon.session import Session

    def fail(_self: Session) -> None:
        raise error

    monkeypatch.setattr(Session, "run", fail)
    code, _, err = run("prune", checkpoint, "-o", "pruned", *with_data(tokens_file))
    assert code == 1
    assert err.strip().splitlines()[-1].startswith("surgeon: error: out of memory: lower --batch-tokens")


def test_ctrl_c_leaves_a_resumable_run(checkpoint: Path, tokens_file: Path, tmp_path: Path) -> None:
    """SIGINT to a real process in the middle; the same command with --resume finishes."""
    command = [sys.executable, "-m", "surgeon", "prune", str(checkpoint), "-o", "pruned", "--samples", "6"]
    command += ["--sequence-length", "16", "--calibration", str(tokens_file), "--test-data", str(tokens_file)]
    process = subprocess.Popen(
        [*command, "--shots", "80"], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    state = tmp_path / "pruned.partial" / "state"
    deadline = time.monotonic() + 120
    while not list(state.glob("shot-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.strip().splitlines()[-1].startswith("surgeon: error: stopped; ")
    assert "Traceback" not in err
    assert not (tmp_path / "pruned").exists()
    done = subprocess.run(
        [*command, "--shots", "80", "--resume"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned" / "surgeon.json").exists()


def test_without_arguments_there_is_help(run: Run) -> None:
    code, out, err = run()
    assert "prune" in out + err
    assert code in {0, 2}
    code, out, _ = run("--version")
    assert (code, out.strip()) == (0, "surgeon 0.1.0")


def test_module_and_script_are_the_same(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("surgeon")
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    outputs = []
    for command in ([sys.executable, "-m", "surgeon"], [str(script)]):
        done = subprocess.run(
            [*command, "prune", "--help"], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert "--sparsity" in outputs[0]
