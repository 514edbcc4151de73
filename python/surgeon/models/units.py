"""Coupled units: what a stock model can really shrink by, as rows and columns of several layers.

An MLP *neuron* is a row of the gate and up projections (fc1, with its bias) and the column of the
down projection (fc2) that reads it. An attention *head* is the query rows of one head and the
columns of the output projection that read it; the key and value rows that its group shares go with
the group's last query head. Removing a unit *is* removing its columns of the output layer: the other
rows then compute what nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from surgeon.layers import PrunableLayer
    from surgeon.models.base import Attention, Matched, Mlp

NEURON = "neuron"
HEAD = "head"


@dataclass(frozen=True)
class Rows:
    """Rows of one layer that go with units.

    Attributes:
        layer: layer index.
        index: rows of each unit ``[U, m]``, or ``[1, m]`` rows shared by all of a group's units.
    """

    layer: int
    index: Tensor


@dataclass(frozen=True)
class UnitGroup:
    """The neurons of one block, or the query heads of one key/value group.

    Attributes:
        kind: :data:`NEURON` or :data:`HEAD`.
        block: decoder block.
        output: layer index of the output layer (down, fc2, o).
        columns: the output layer's columns of each unit, ``[U, m]``.
        own: rows that go with each unit.
        shared: rows that go with the last unit.
        sources: rows that make a unit's output zero whatever the input when any one of these parts is
            zero: gate, up and fc1 rows, and the value rows. (A head without query or key rows still
            averages the values.) Gate and fc1 rows count only where the activation is zero at zero:
            otherwise a neuron without them is a constant, or linear, and not gone.
    """

    kind: str
    block: int
    output: int
    columns: Tensor
    own: tuple[Rows, ...]
    shared: tuple[Rows, ...]
    sources: tuple[Rows, ...]

    @property
    def units(self) -> int:
        """U, number of units."""
        return int(self.columns.shape[0])

    def unit_size(self, layers: tuple[PrunableLayer, ...]) -> int:
        """Parameters that one unit frees."""
        rows = sum(int(part.index.shape[1]) * layers[part.layer].columns for part in self.own)
        return rows + int(self.columns.shape[1]) * layers[self.output].rows

    def shared_size(self, layers: tuple[PrunableLayer, ...]) -> int:
        """Parameters that the last unit frees besides."""
        return sum(int(part.index.shape[1]) * layers[part.layer].columns for part in self.shared)


def unit_groups(matched: Matched, config: PreTrainedConfig, kinds: frozenset[str]) -> tuple[UnitGroup, ...]:
    """Every coupled unit of some kinds, block after block, heads before neurons.

    Raises:
        ModelError: a block's shapes do not fit the family's layout.
    """
    by_block: dict[int, dict[str, int]] = {}
    for index, layer in enumerate(matched.layers):
        by_block.setdefault(layer.block, {})[layer.role] = index
    groups: list[UnitGroup] = []
    for block, roles in sorted(by_block.items()):
        if HEAD in kinds and matched.adapter.attention is not None:
            groups += _heads(block, roles, matched.layers, matched.adapter.attention, config)
        if NEURON in kinds and matched.adapter.mlp is not None:
            groups += _neurons(block, roles, matched.layers, matched.adapter.mlp, config)
    return tuple(groups)


def zero_at_zero(activation: str) -> bool:
    """Whether an activation function maps zero to exactly zero.

    Args:
        activation: its name in ``transformers.activations.ACT2FN``; an unknown one does not count.
    """
    from transformers.activations import ACT2FN

    return activation in ACT2FN and not bool(ACT2FN[activation](torch.zeros(1)).any())


def _neurons(
    block: int,
    roles: dict[str, int],
    layers: tuple[PrunableLayer, ...],
    mlp: Mlp,
    config: PreTrainedConfig,
) -> list[UnitGroup]:
    if any(role not in roles for role in (*mlp.inner, mlp.output)):
        return []
    output = roles[mlp.output]
    width = layers[output].inputs
    own: list[Rows] = []
    for role in mlp.inner:
        layer = layers[roles[role]]
        if layer.rows % width:
            raise ModelError(f"layer {layer.name} has {layer.rows} rows, no multiple of the MLP width {width}")
        # A fused projection holds gate rows, then up rows.
        own += [Rows(roles[role], torch.arange(start, start + width)[:, None]) for start in range(0, layer.rows, width)]
    columns = torch.arange(width)[:, None]
    # The activation sees the first part; what it is multiplied with makes zero by itself.
    sources = own if zero_at_zero(str(getattr(config, mlp.activation, ""))) else own[1:]
    return [UnitGroup(NEURON, block, output, columns, tuple(own), (), tuple(sources))]


def _heads(
    block: int,
    roles: dict[str, int],
    layers: tuple[PrunableLayer, ...],
    attention: Attention,
    config: PreTrainedConfig,
) -> list[UnitGroup]:
    if any(role not in roles for role in (attention.q, attention.k, attention.v, attention.output)):
        return []
    output = roles[attention.output]
    heads = int(config.num_attention_heads)
    width = layers[output].inputs // heads
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    q, k, v = (layers[roles[role]] for role in (attention.q, attention.k, attention.v))
    offsets = {
        "separate": (0, 0, 0),
        "stacked": (0, heads * width, (heads + groups) * width),
        "interleaved": (0, width, 2 * width),
    }[attention.layout]
    stride = 3 * width if attention.layout == "interleaved" else width
    needed = {"separate": heads, "stacked": heads + 2 * groups, "interleaved": 3 * heads}[attention.layout] * width
    separate = attention.layout == "separate"
    if (
        layers[output].inputs % heads
        or heads % groups
        or (attention.layout == "interleaved" and groups != heads)
        or q.rows != needed
        or (separate and (k.rows != groups * width or v.rows != groups * width))
    ):
        raise ModelError(f"layer {q.name} does not fit {heads} heads in {groups} groups of width {width}")

    def rows(of: int, head: int) -> Tensor:
        start = offsets[of] + head * stride
        return torch.arange(start, start + width)

    found: list[UnitGroup] = []
    each = heads // groups
    for group in range(groups):
        members = range(group * each, (group + 1) * each)
        queries = Rows(roles[attention.q], torch.stack([rows(0, head) for head in members]))
        keys = Rows(roles[attention.k], rows(1, group)[None])
        values = Rows(roles[attention.v], rows(2, group)[None])
        columns = torch.stack([torch.arange(head * width, (head + 1) * width) for head in members])
        # A head alone in its group takes its key and value along: they are its own.
        own, shared = ((queries, keys, values), ()) if each == 1 else ((queries,), (keys, values))
        found.append(UnitGroup(HEAD, block, output, columns, own, shared, (values,)))
    return found
