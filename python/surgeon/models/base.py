"""What the package knows of a model family, and how the layers to prune are found in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from surgeon.errors import ModelError
from surgeon.layers import PrunableLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One model family.

    Attributes:
        family: the name people know it by.
        model_types: values of ``config.model_type`` that it covers.
        blocks: module path of the list of decoder blocks.
        linears: role → module path inside a block, in the order the forward pass reaches them.
    """

    family: str
    model_types: tuple[str, ...]
    blocks: str
    linears: Mapping[str, str]


@dataclass(frozen=True)
class Matched:
    """The layers of one model that can be pruned, and the linear layers that are left alone.

    Attributes:
        adapter: the family.
        layers: in forward order; their index here is the layer index everywhere else.
        skipped: names of linear modules that are not pruned (the head, for one).
    """

    adapter: Adapter
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


def adapter_for(model_type: str) -> Adapter:
    """The adapter of a ``config.model_type``.

    Raises:
        ModelError: no adapter covers it.
    """
    try:
        return _REGISTRY[model_type]
    except KeyError:
        known = ", ".join(supported_model_types())
        raise ModelError(f"models of type {model_type!r} are not supported; supported are: {known}") from None


def match_layers(model: PreTrainedModel) -> Matched:
    """Find the prunable layers of a model.

    Raises:
        ModelError: the family is not supported, or not a single layer matches.
    """
    adapter = adapter_for(str(model.config.model_type))
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
            if type(module) is nn.Linear:
                layers.append(PrunableLayer(f"{adapter.blocks}.{child}.{path}", role, index, module))
    if not layers:
        raise ModelError(
            f"no prunable layer was found in {type(model).__name__} as a {adapter.family} model: "
            f"looked for {', '.join(adapter.linears.values())} in {adapter.blocks}"
        )
    names = {layer.name for layer in layers}
    skipped = tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names
    )
    return Matched(adapter, tuple(layers), skipped)
