"""The whole of a run's settings as one frozen value: checked once, written to TOML, digested.

Nothing else in the package reads environment variables or global switches for behaviour, so two
runs with equal configurations, models and data are the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgeon.errors import ConfigError
from surgeon.structures import (
    Method,
    Update,
    check_together,
    parse_curvature,
    parse_method,
    parse_structure,
    parse_update,
)

if TYPE_CHECKING:
    from pathlib import Path

    from surgeon.structures import Curvature, Structure

RANKS = ("cost", "cost-per-parameter")
FISHERS = ("empirical", "mc")
PRECISIONS = ("float32", "float64")
BUDGETS = ("sparsity", "target_parameters", "target_size")
DEFAULT_SPARSITY = 0.3
DEFAULT_SHOTS = 8
MOST_SHOTS = 10_000
ROUNDING = 1e-12  # of a decimal fraction such as 0.6667, or 2 / 3 in other words

# Why a setting may be without effect.
_WITHOUT = {
    "rounds": "layer-wise methods select within each layer",
    "fisher_samples": "only --fisher mc draws tokens",
    "chunk": "only --update chunked has chunks",
    "correction_epochs": "it comes between shots and there is one",
    "heal_epochs": "there is no --heal",
    "lora_rank": "there is no --heal and no correction between shots",
    "lora_learning_rate": "there is no --heal and no correction between shots",
    "damping_g": "nothing inverts G",
    "damping_a": "nothing inverts A",
}

_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Settings of one pruning run.

    Attributes:
        model: checkpoint folder, hub id or ``demo``.
        structure: which units may go (:class:`~surgeon.structures.Structure`).
        sparsity: fraction of the decoder blocks' linear parameters (weights and biases) that go,
            ``0 <= sparsity < 1``. The smallest set that reaches it is taken (layer-wise methods round up in
            every row or block). If neither this nor a target is
            given it is 0.3, and all groups for N:M; None if a target is.
        target_parameters: instead of ``sparsity``: how many parameters the whole model may keep.
        target_size: instead of ``sparsity``: the same as bytes, ``12GiB`` or ``500MB``, of what remains
            in the checkpoint's dtype.
        method: :class:`~surgeon.structures.Method`.
        curvature: :class:`~surgeon.structures.Curvature`; None means the method's own.
        fisher: ``empirical`` (the data's own next token) or ``mc`` (drawn from the model).
        fisher_samples: draws a token for ``mc``.
        kronecker_terms: how many Kronecker products ``kron`` adds up.
        update: :class:`~surgeon.structures.Update`; None means the method's own.
        chunk: weights of one solve of ``chunked``.
        rank_by: what units are ranked by, ``cost`` or ``cost-per-parameter`` that they free; None means
            per parameter. Single weights and N:M groups free one each.
        shots: over how many estimates of the curvature the removal is spread; None means
            8, or 1 for the layer-wise methods.
        rounds: over how many rounds of costs, selection and update each shot's removal is spread, all with
            the shot's one curvature.
        calibration: calibration text (see :mod:`surgeon.data`).
        samples: number of calibration windows.
        sequence_length: tokens a window, for calibration and for evaluation; None means 2048, or as
            many positions as the model has if these are fewer.
        test_data: text whose perplexity is reported.
        test_samples: how many of its windows, from the start; None means all.
        seed: draws the calibration windows.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: arithmetic of the model while it is pruned; the checkpoint keeps its own dtype.
        batch_tokens: tokens a batch; changes speed and memory, never the result.
        damping_g: relative damping of G: this times the mean of its diagonal is added to it.
        damping_a: the same for A.
        heal: fit low-rank adapters after the last shot and merge them (needs the extra ``heal``).
        heal_epochs: passes over the calibration windows of that fit.
        correction_epochs: passes of such a fit after every other shot; 0 for none.
        lora_rank: rank of the adapters.
        lora_learning_rate: of their Adam at the first step; it falls to zero.
    """

    model: str = "demo"
    structure: str = "rows-columns"
    sparsity: float | None = None
    target_parameters: int | None = None
    target_size: str | None = None
    method: str = "surgeon"
    curvature: str | None = None
    fisher: str = "empirical"
    fisher_samples: int = 1
    kronecker_terms: int = 1
    update: str | None = None
    chunk: int = 2000
    rank_by: str | None = None
    shots: int | None = None
    rounds: int = 1
    calibration: str = "wiki-mini"
    samples: int = 128
    sequence_length: int | None = None
    test_data: str = "wiki-mini"
    test_samples: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    batch_tokens: int = 2048
    damping_g: float = 0.1
    damping_a: float = 0.01
    heal: bool = False
    heal_epochs: float = 1.0
    correction_epochs: float = 0.0
    lora_rank: int = 8
    lora_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        self._check_choices()
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        _need(len(given) < 2, f"{' and '.join(map(_option, given))} say the same in different ways: give one")
        pattern = self.structure_value.pattern
        if not given:
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY if pattern is None else pattern.sparsity)
        _need(
            self.sparsity is None or 0.0 <= self.sparsity < 1.0,
            f"sparsity is {self.sparsity}: it is removed / total, from 0 to below 1",
        )
        _need(
            pattern is None or self.sparsity is None or self.sparsity <= pattern.sparsity + ROUNDING,
            f"sparsity is {self.sparsity}: {pattern} removes at most {0 if pattern is None else pattern.sparsity:g}",
        )
        _need(
            self.target_parameters is None or self.target_parameters > 0,
            f"target-parameters is {self.target_parameters}: it must be positive",
        )
        if self.target_size is not None:
            parse_size(self.target_size)
        if self.shots is None:
            object.__setattr__(self, "shots", 1 if self.method_value.layerwise else DEFAULT_SHOTS)
        _need(self.shot_count <= MOST_SHOTS, f"shots is {self.shots}: it must be at most {MOST_SHOTS}")
        _need(
            pattern is None or not self.method_value.layerwise or (self.shots == 1 and self.all_groups),
            f"{self.method} prunes every group of {self.structure} at once: leave --sparsity, targets and --shots out",
        )
        self._check_effect()
        for name, least in (
            ("shots", 1),
            ("samples", 1),
            ("rounds", 1),
            ("sequence_length", 2),
            ("batch_tokens", 1),
            ("seed", 0),
            ("fisher_samples", 1),
            ("kronecker_terms", 1),
            ("chunk", 1),
            ("lora_rank", 1),
        ):
            value = getattr(self, name)
            _need(value is None or value >= least, f"{_option(name)} is {value}: it must be at least {least}")
        _need(
            self.test_samples is None or self.test_samples >= 1,
            f"test-samples is {self.test_samples}: it must be at least 1",
        )
        for name in ("damping_g", "damping_a"):
            value = getattr(self, name)
            _need(0.0 <= value < 1e6, f"{_option(name)} is {value}: it must be zero or a positive number")
        for name in ("heal_epochs", "lora_learning_rate"):
            value = getattr(self, name)
            _need(0.0 < value < 1e6, f"{_option(name)} is {value}: it must be a positive number")
        _need(
            0.0 <= self.correction_epochs < 1e6,
            f"correction-epochs is {self.correction_epochs}: it must be zero or a positive number",
        )

    def _check_choices(self) -> None:
        for name, choices in (("precision", PRECISIONS), ("fisher", FISHERS), ("rank_by", RANKS)):
            value = getattr(self, name)
            _need(
                value is None or value in choices,
                f"unknown {_option(name)} {value!r}: choose one of {', '.join(choices)}",
            )
        check_together(
            self.structure_value, self.method_value, self.curvature_value, self.update_value, self.kronecker_terms
        )
        _need(
            self.rank_by is None or not self.structure_value.elementwise,
            f"all units of {self.structure} are of one size: leave --rank-by out",
        )
        _need(
            self.fisher == "empirical" or self.curvature_value in {"kfac", "kron"},
            f"{self.curvature_value} curvature needs no gradients: leave --fisher out",
        )

    def _check_effect(self) -> None:
        """Refuse settings that would change nothing: who gives one believes that it does."""
        inverts = self.method_value is Method.SURGEON
        effects = {
            "rounds": not self.method_value.layerwise,
            "fisher_samples": self.fisher == "mc",
            "chunk": self.update_value is Update.CHUNKED,
            "correction_epochs": self.shot_count > 1,
            "heal_epochs": self.heal,
            "lora_rank": self.heals,
            "lora_learning_rate": self.heals,
            "damping_g": inverts and self.curvature_value in {"kfac", "kron"},
            "damping_a": inverts or self.method_value is Method.SPARSEGPT,
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, works in effects.items():
            _need(
                works or getattr(self, name) == defaults[name],
                f"{_option(name)} has no effect with these settings ({_WITHOUT[name]}): leave it out",
            )

    @property
    def all_groups(self) -> bool:
        """Whether every N:M group is to be pruned."""
        pattern = self.structure_value.pattern
        return pattern is not None and self.sparsity is not None and self.sparsity >= pattern.sparsity - ROUNDING

    @property
    def shot_count(self) -> int:
        """``shots``, which is set once the settings are made."""
        assert self.shots is not None
        return self.shots

    @property
    def structure_value(self) -> Structure:
        """``structure`` as a value."""
        return parse_structure(self.structure)

    @property
    def method_value(self) -> Method:
        """``method`` as a value."""
        return parse_method(self.method)

    @property
    def curvature_value(self) -> Curvature:
        """``curvature``, or the method's own, as a value."""
        return self.method_value.curvatures[0] if self.curvature is None else parse_curvature(self.curvature)

    @property
    def update_value(self) -> Update:
        """``update``, or the method's own, as a value."""
        if self.update is not None:
            return parse_update(self.update)
        return Update.JOINT if self.method_value.updates else Update.NONE

    @property
    def heals(self) -> bool:
        """Whether low-rank adapters are fitted anywhere."""
        return self.heal or self.correction_epochs > 0

    @property
    def needs_data(self) -> bool:
        """Whether calibration windows are looked at."""
        return self.method_value.needs_data or self.heals

    @property
    def per_parameter(self) -> bool:
        """Whether units are ranked by cost per parameter that they free."""
        if self.rank_by is None:
            return not self.structure_value.elementwise
        return self.rank_by == "cost-per-parameter"

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, as plain values."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """SHA-256 over the settings that decide the result.

        ``device`` and ``batch_tokens`` are left out: they change where and how fast a run happens,
        and a run may be resumed with others.
        """
        deciding = {k: v for k, v in self.to_dict().items() if k not in {"device", "batch_tokens"}}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def to_toml(self) -> str:
        """The settings as TOML that :func:`load_toml` reads back to the same values."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.to_dict().items() if value is not None]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PruneConfig:
        """Build from plain values; keys may use ``-`` or ``_``.

        Raises:
            ConfigError: a key is unknown, or a value has the wrong type or range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        clean: dict[str, Any] = {}
        for raw, value in values.items():
            key = raw.replace("-", "_")
            if key not in fields:
                raise ConfigError(f"unknown setting {raw!r}: known are {', '.join(map(_option, fields))}")
            clean[key] = _coerce(key, str(fields[key].type), value)
        return cls(**clean)


def parse_size(text: str) -> int:
    """Bytes of ``12GiB`` (powers of 1024) or ``12GB`` (powers of 1000).

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(f"{text!r} is no size: write it like 12GiB or 500MB")
    unit = match.group(2).lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match.group(1)) * base ** _POWERS[unit.rstrip("i")])


def load_toml(path: Path) -> dict[str, Any]:
    """Read a configuration file's top-level keys.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _option(name: str) -> str:
    return name.replace("_", "-")


def _need(condition: bool, message: str) -> None:  # noqa: FBT001
    if not condition:
        raise ConfigError(message)


def _coerce(key: str, type_name: str, value: Any) -> Any:
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    base = type_name.removesuffix(" | None")
    if value is None and type_name.endswith("| None"):
        return None
    if base == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)  # 5e9 is a count too
    if not isinstance(value, kinds[base]) or isinstance(value, bool) != (base == "bool"):
        raise ConfigError(f"{_option(key)} is {value!r}: it must be of type {base}")
    return float(value) if base == "float" else value
