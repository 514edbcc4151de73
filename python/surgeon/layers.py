"""A linear layer as pruning sees it: one matrix ``W [R, C]`` with the bias as its last column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class PrunableLayer:
    """One linear layer of a decoder block.

    Attributes:
        name: full module name, e.g. ``model.layers.3.mlp.up_proj``.
        role: what it is in its block: ``q k v o gate up down`` or ``fc1 fc2``.
        block: index of its decoder block.
        module: the live module, ``weight [R, in_features]`` and an optional ``bias [R]``.
        transposed: its weight is ``[in_features, R]`` instead (GPT-2's ``Conv1D``).
    """

    name: str
    role: str
    block: int
    module: nn.Module
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The live weight as ``[R, in_features]``: a view, whatever the module's own order."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """The live bias ``[R]``, if there is one."""
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return None if bias is None else bias.detach()

    @property
    def has_bias(self) -> bool:
        """Whether the last of the C columns is a bias."""
        return self.bias is not None

    @property
    def rows(self) -> int:
        """R, the out features."""
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        """The in features, without the bias."""
        return int(self.weight.shape[1])

    @property
    def columns(self) -> int:
        """C, the in features, and one more for a bias."""
        return self.inputs + int(self.has_bias)

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, C)``."""
        return self.rows, self.columns

    @property
    def parameters(self) -> int:
        """R · C: weights and biases."""
        return self.rows * self.columns

    @torch.no_grad()
    def read(self, dtype: torch.dtype) -> Tensor:
        """A copy of ``W_RC`` in ``dtype``, the bias folded in as the last column."""
        weight, bias = self.weight.to(dtype), self.bias
        if bias is None:
            return weight.clone(memory_format=torch.contiguous_format)
        return torch.cat([weight, bias.to(dtype).unsqueeze(1)], dim=1)

    @torch.no_grad()
    def write(self, W_RC: Tensor) -> None:
        """Write ``W_RC`` back in the module's own dtype; zeros are written as ``+0.0``.

        Raises:
            NonFiniteError: a value is NaN or infinite, or overflows the module's dtype.
        """
        weight, bias = self.weight, self.bias
        W_RC = W_RC.to(weight.dtype)
        bad = ~torch.isfinite(W_RC)
        if bad.any():
            index = int(bad.flatten().nonzero()[0])
            raise NonFiniteError(f"new weight {index} of layer {self.name} is not finite", layer=self.name, index=index)
        W_RC = W_RC + 0.0  # -0.0 + 0.0 is +0.0: negative zeros break sparse kernels
        if bias is not None:
            bias.copy_(W_RC[:, -1])
            W_RC = W_RC[:, :-1]
        weight.copy_(W_RC)
