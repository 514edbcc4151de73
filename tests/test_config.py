"""Settings: checks, TOML, digest; schedules and sizes."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from surgeon.config import PruneConfig, load_toml, parse_size
from surgeon.errors import ConfigError
from surgeon.schedule import shot_targets


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"sparsity": "much"}, "must be of type float"),
        ({"structure": "blocks"}, "unknown structure 'blocks': choose one of rows-columns, rows, columns"),
        ({"method": "luck"}, "unknown method 'luck'"),
        ({"shots": 0}, "shots is 0"),
        ({"shots": True}, "must be of type int"),
        ({"samples": 0}, "samples is 0"),
        ({"sequence-length": 1}, "sequence-length is 1"),
        ({"test-samples": 0}, "test-samples is 0"),
        ({"batch-tokens": 0}, "batch-tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"damping-g": -1.0}, "damping-g is -1.0"),
        ({"damping_a": float("inf")}, "damping-a is inf"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"target-parameters": 0}, "target-parameters is 0"),
        ({"target-parameters": 5, "target-size": "1GB"}, "give one"),
        ({"sparsity": 0.1, "target-size": "1GB"}, "sparsity and target-size say the same"),
        ({"target-size": "big"}, "is no size"),
        ({"shots": 2_000_000}, "at most 10000"),
        ({"shots": 2.5}, "must be of type int"),
        ({"sparsty": 0.5}, "unknown setting 'sparsty'"),
    ],
)
def test_bad_settings_say_what_is_wrong(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_dict(values)


def test_toml_round_trip(tmp_path: Path) -> None:
    config = PruneConfig(model='a "b"\\c', sparsity=0.25, test_samples=3, damping_g=1e-5)
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert PruneConfig.from_dict(load_toml(path)) == config
    assert tomllib.loads(config.to_toml())["sparsity"] == 0.25


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = b")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(tmp_path / "bad.toml")


def test_one_budget_and_a_default() -> None:
    assert PruneConfig().sparsity == 0.3
    assert PruneConfig(target_size="1GB").sparsity is None
    assert PruneConfig.from_dict({"target-parameters": 5e9}).target_parameters == 5_000_000_000


def test_digest_covers_what_decides_the_result() -> None:
    for field in dataclasses.fields(PruneConfig):
        changed = {"model": "x", "structure": "rows", "method": "k-obd", "calibration": "x", "test_data": "x"}
        changed |= {"device": "cpu", "precision": "float64", "target_size": "1GB"}  # type: ignore[dict-item]
        changed |= {"curvature": "kron", "fisher": "mc", "update": "none", "rank_by": "cost-per-parameter"}
        changed |= {"heal": True}  # type: ignore[dict-item]
        value = changed.get(field.name, 7 if "damping" not in field.name and field.name != "sparsity" else 0.5)
        budget: dict[str, object] = {"sparsity": None} if field.name.startswith("target_") else {}
        with_effect: dict[str, dict[str, object]] = {
            "kronecker_terms": {"curvature": "kron"},
            "fisher_samples": {"fisher": "mc"},
            "chunk": {"structure": "weights", "update": "chunked"},
            "heal_epochs": {"heal": True},
            "lora_rank": {"heal": True},
            "lora_learning_rate": {"heal": True},
        }
        base = PruneConfig(**with_effect.get(field.name, {}))  # type: ignore[arg-type]
        value = 2 if field.name == "kronecker_terms" else value
        other = dataclasses.replace(base, **{**budget, field.name: value})
        same = field.name in {"device", "batch_tokens"}
        assert (other.digest() == base.digest()) is same, field.name


def targets(**settings: object) -> list[int]:
    config = PruneConfig(**settings)  # type: ignore[arg-type]
    return shot_targets(config, prunable=1000, total=1500, bytes_a_parameter=2)


def test_schedule_is_linear_in_the_removed() -> None:
    assert targets(sparsity=0.3, shots=5) == [60, 120, 180, 240, 300]
    assert targets(sparsity=0.3, shots=1) == [300]
    assert targets(sparsity=0.0, shots=2) == [0, 0]
    assert targets(target_parameters=1200, shots=2) == [150, 300]
    assert targets(target_size="2.4kB", shots=2) == [150, 300]


def test_impossible_budgets() -> None:
    with pytest.raises(ConfigError, match="fewer than"):
        targets(target_parameters=1501)
    with pytest.raises(ConfigError, match="500 of the model's 1,500 cannot be pruned"):
        targets(target_parameters=500)


def test_sizes() -> None:
    assert parse_size("12GiB") == 12 * 2**30
    assert parse_size("500MB") == 500_000_000
    assert parse_size(" 1.5 kb ") == 1500
    assert parse_size("77") == 77
    for bad in ("", "GiB", "-3GB", "3XB", "3 GiBB"):
        with pytest.raises(ConfigError, match="no size"):
            parse_size(bad)
