"""Second moments of a layer's inputs and output gradients, and the Fisher itself, one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def _keeper(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        inputs[name], outputs[name] = args[0], out

    return keep


def _run(
    model: PreTrainedModel, modules: dict[str, nn.Linear], ids: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probabilities ``[T, V]`` of one window; inputs (a bias is a last 1) and outputs by layer, ``[T, ·]``."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():
        module.weight.requires_grad_()
        handles.append(module.register_forward_hook(_keeper(name, inputs, outputs)))
    with torch.enable_grad():
        log_p = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    a = {}
    for name, module in modules.items():
        module.weight.requires_grad_(False)
        a[name] = inputs[name].detach().reshape(len(ids), -1)
        if module.bias is not None:
            a[name] = torch.cat([a[name], torch.ones(len(ids), 1, dtype=a[name].dtype)], 1)
    return log_p, a, outputs


def _gradients(loss: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(outputs.values()), retain_graph=True)
    return {name: g.reshape(-1, g.shape[-1]) for name, g in zip(outputs, found, strict=True)}


Pairs = dict[str, tuple[Tensor, Tensor]]


def token_pairs(
    model: PreTrainedModel,
    modules: dict[str, nn.Linear],
    windows: list[Tensor],
    labels: list[Tensor] | None = None,
) -> Pairs:
    """``(a [N, C], g [N, R])`` of every token by layer.

    Each window is run alone, without padding; gradients are those of the window's summed next-token
    loss, on its own next tokens or on ``labels`` (one less than the window has tokens).
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    gradients: dict[str, list[Tensor]] = {name: [] for name in modules}
    for number, ids in enumerate(windows):
        targets = ids[1:] if labels is None else labels[number]
        log_p, a, outputs = _run(model, modules, ids)
        g = _gradients(sum(-log_p[t, targets[t]] for t in range(len(ids) - 1)), outputs)
        for name in modules:
            inputs[name].append(a[name])
            gradients[name].append(g[name])
    return {name: (torch.cat(inputs[name]), torch.cat(gradients[name])) for name in modules}


def naive_moments(
    model: PreTrainedModel,
    modules: dict[str, nn.Linear],
    windows: list[Tensor],
    labels: list[Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and G by a plain loop over tokens; a bias is a last input of 1. Gradients as in :func:`token_pairs`."""
    A, G = {}, {}
    for name, (a, g) in token_pairs(model, modules, windows, labels).items():
        A[name] = torch.zeros(a.shape[1], a.shape[1], dtype=a.dtype)
        G[name] = torch.zeros(g.shape[1], g.shape[1], dtype=g.dtype)
        for t in range(len(a)):
            A[name] += torch.outer(a[t], a[t])
            G[name] += torch.outer(g[t], g[t])
        A[name] /= len(a)
        G[name] /= len(g)
    return A, G


def weighted_pairs(model: PreTrainedModel, modules: dict[str, nn.Linear], windows: list[Tensor]) -> Pairs:
    """As :func:`token_pairs` for the exact Fisher: every label at every place, weighted by its probability.

    The score has mean zero under the model and labels of different places are independent given the
    inputs, so ``E[g gᵀ]`` is the sum over places and labels of ``p · g gᵀ`` with g the gradient of
    that one loss term. Each is returned as a sample ``√p · g`` together with the input it belongs to;
    the sum of their outer products, over N tokens, is the Fisher.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    gradients: dict[str, list[Tensor]] = {name: [] for name in modules}
    for ids in windows:
        log_p, a, outputs = _run(model, modules, ids)
        for t in range(len(ids) - 1):
            for label in range(log_p.shape[1]):
                g = _gradients(-log_p[t, label], outputs)
                for name in modules:
                    inputs[name].append(a[name])
                    gradients[name].append(g[name] * log_p[t, label].detach().exp().sqrt())
    return {name: (torch.cat(inputs[name]), torch.cat(gradients[name])) for name in modules}


def rearranged_fisher(a: Tensor, g: Tensor, tokens: int) -> Tensor:
    """``(1/N) Σ vec(g gᵀ) vec(a aᵀ)ᵀ``, ``[R², C²]``: the Fisher in Van Loan's order, from its dense form.

    The Fisher is built as a ``[RC, RC]`` matrix of per-token weight gradients and reordered entry by
    entry; ``rearranged(G ⊗ A) = vec(G) vec(A)ᵀ``.
    """
    R, C = g.shape[1], a.shape[1]
    F = torch.zeros(R * C, R * C, dtype=a.dtype)
    for t in range(len(a)):
        gradient = torch.outer(g[t], a[t]).reshape(-1)
        F += torch.outer(gradient, gradient) / tokens
    rearranged = torch.zeros(R * R, C * C, dtype=a.dtype)
    for i in range(R):
        for j in range(R):
            rearranged[i * R + j] = F[i * C : (i + 1) * C, j * C : (j + 1) * C].reshape(-1)
    return rearranged
