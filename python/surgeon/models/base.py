"""What the package knows of a model family, and how the layers to prune are found in a model.

Every family is one small file beside this one with one :func:`register`; :class:`Adapter` says how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from surgeon.errors import ModelError
from surgeon.layers import PrunableLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

# Settings by which a configuration tells how many experts an MLP has: (Mixtral, GPT-OSS, Llama 4),
# (Qwen, OLMoE), (DeepSeek, GLM), (DBRX, ERNIE). One of each would be a dense model.
_EXPERT_COUNTS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"})


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Where a block's MLP neurons are.

    Attributes:
        inner: roles whose rows are neurons, the one that the activation is applied to first: fc1; gate
            and up; or one role that holds gate rows and then up rows.
        output: role whose columns are neurons.
        activation: the setting of ``config`` that names the activation function.
    """

    inner: tuple[str, ...]
    output: str
    activation: str = "hidden_act"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Where a block's attention heads are.

    Attributes:
        q: role of the query rows; the same role for k and v where one projection makes all three.
        k: role of the key rows.
        v: role of the value rows.
        output: role whose columns are heads.
        layout: ``separate`` projections; one that ``stacked`` all queries, then keys, then values
            (GPT-2, Phi-3); or one with each head's query, key and value ``interleaved`` (GPT-NeoX).
    """

    q: str
    k: str
    v: str
    output: str
    layout: Literal["separate", "stacked", "interleaved"] = "separate"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One model family.

    To add a family, read its modelling file in ``transformers`` and write a file here:

    * Where all paths are a known family's, :func:`register` the copy that :func:`dataclasses.replace`
      makes with another ``family`` and ``model_types`` (``mistral.py``).
    * Else name the linears of one decoder block in the order of its forward pass (``phi.py``). Linears
      that every input reaches belong here, ``nn.Linear`` or ``Conv1D``; routed experts do not.
    * ``mlp`` and ``attention`` say where neurons and heads are; see where the modelling code splits a
      fused projection before choosing the ``layout``. None for what has no such units.
    * Import the file in ``models/__init__.py``, and add a tiny model to ``FAMILIES`` in
      ``tests/conftest.py`` and its names to ``tests/test_families.py``: the contract test then checks
      matching, units, curvature and a pruned checkpoint's way to disk and back.

    Attributes:
        family: the name people know it by.
        model_types: values of ``config.model_type`` that it covers.
        blocks: module path of the list of decoder blocks.
        linears: role → module path inside a block, in the order the forward pass reaches them.
        mlp: its neurons; None if they cannot be removed.
        attention: its heads; None if they cannot be removed.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    linears: Mapping[str, str]
    mlp: Mlp | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class Matched:
    """The layers of one model that can be pruned, and the linear layers that are left alone.

    Attributes:
        adapter: the family.
        blocks: the decoder blocks.
        layers: in forward order; their index here is the layer index everywhere else.
        skipped: names of linear modules that are not pruned (the head, for one).
    """

    adapter: Adapter
    blocks: tuple[nn.Module, ...]
    layers: tuple[PrunableLayer, ...]
    skipped: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Total over the layers of R · C."""
        return sum(layer.parameters for layer in self.layers)


_REGISTRY: dict[str, Adapter] = {}


def register(adapter: Adapter) -> Adapter:
    """Make an adapter known for its model types."""
    for model_type in adapter.model_types:
        _REGISTRY[model_type] = adapter
    return adapter


def supported_model_types() -> tuple[str, ...]:
    """Every ``config.model_type`` with an adapter, sorted."""
    return tuple(sorted(_REGISTRY))


def adapter_for(config: PreTrainedConfig) -> Adapter:
    """The adapter of a model's configuration.

    Raises:
        ModelError: no adapter covers its ``model_type``; mixture-of-experts models are told so.
    """
    model_type = str(config.model_type)
    if model_type in _REGISTRY:
        return _REGISTRY[model_type]
    known = ", ".join(supported_model_types())
    if _has_experts(config.to_dict()):
        raise ModelError(
            f"mixture-of-experts models, of which type {model_type!r} is one, are not supported yet; "
            f"supported are: {known}"
        )
    raise ModelError(f"models of type {model_type!r} are not supported; supported are: {known}")


def _has_experts(settings: Mapping[str, object]) -> bool:
    """Whether a configuration, or one nested in it, counts more than one expert (some count them in lists)."""
    for key, value in settings.items():
        if isinstance(value, dict):
            if _has_experts(value):
                return True
        elif key in _EXPERT_COUNTS:
            counts = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(count, int) and count > 1 for count in counts):
                return True
    return False


def _is_conv1d(module: nn.Module) -> bool:
    # By name: the class is transformers', which loads when a model does.
    return type(module).__name__ == "Conv1D"


def match_layers(model: PreTrainedModel) -> Matched:
    """Find the prunable layers of a model.

    Raises:
        ModelError: the family is not supported, or not a single layer matches.
    """
    adapter = adapter_for(model.config)
    try:
        blocks = model.get_submodule(adapter.blocks)
    except AttributeError:
        raise ModelError(
            f"{type(model).__name__} has no {adapter.blocks!r}: it is not a {adapter.family} causal language model"
        ) from None
    layers: list[PrunableLayer] = []
    for index, (child, block) in enumerate(blocks.named_children()):
        for role, path in adapter.linears.items():
            try:
                module = block.get_submodule(path)
            except AttributeError:
                continue
            transposed = _is_conv1d(module)
            if transposed or type(module) is nn.Linear:
                layers.append(PrunableLayer(f"{adapter.blocks}.{child}.{path}", role, index, module, transposed))
    if not layers:
        raise ModelError(
            f"no prunable layer was found in {type(model).__name__} as a {adapter.family} model: "
            f"looked for {', '.join(adapter.linears.values())} in {adapter.blocks}"
        )
    names = {layer.name for layer in layers}
    skipped = tuple(
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_conv1d(module)) and name not in names
    )
    return Matched(adapter, tuple(blocks.children()), tuple(layers), skipped)
