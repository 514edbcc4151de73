"""Second moments of a layer's inputs and output gradients, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def _keeper(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        inputs[name], outputs[name] = args[0], out

    return keep


def naive_moments(
    model: PreTrainedModel, modules: dict[str, nn.Linear], windows: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and G by a plain loop over windows and tokens; a bias is a last input of 1.

    Each window is run alone, without padding; gradients are those of the window's summed next-token
    loss.
    """
    A = {name: torch.zeros(0) for name in modules}
    G = {name: torch.zeros(0) for name in modules}
    tokens = 0
    for ids in windows:
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        handles = []
        for name, module in modules.items():
            module.weight.requires_grad_()

            handles.append(module.register_forward_hook(_keeper(name, inputs, outputs)))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = sum(nn.functional.cross_entropy(logits[t], ids[t + 1]) for t in range(len(ids) - 1))
        gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
        for handle in handles:
            handle.remove()
        for (name, module), gradient in zip(modules.items(), gradients, strict=True):
            module.weight.requires_grad_(False)
            a = inputs[name].detach().reshape(len(ids), -1)
            g = gradient.reshape(len(ids), -1)
            if module.bias is not None:
                a = torch.cat([a, torch.ones(len(ids), 1, dtype=a.dtype)], 1)
            for t in range(len(ids)):
                A[name] = A[name] + torch.outer(a[t], a[t]) if A[name].numel() else torch.outer(a[t], a[t])
                G[name] = G[name] + torch.outer(g[t], g[t]) if G[name].numel() else torch.outer(g[t], g[t])
        tokens += len(ids)
    return {k: v / tokens for k, v in A.items()}, {k: v / tokens for k, v in G.items()}
