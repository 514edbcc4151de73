"""K-FAC factors against a per-token loop and against curvlinops; life cycle of the hooks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from surgeon.curvature import CurvatureFactors, identity, kfac
from surgeon.data import Windows
from surgeon.errors import NonFiniteError, ZeroCurvatureError
from surgeon.models import match_layers
from tests.conftest import VOCABULARY, tiny_llama, tiny_opt
from tests.oracles.moments import naive_moments


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.double().requires_grad_(False)


def windows(n: int = 5, length: int = 12) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(torch.randint(0, VOCABULARY, (n, length), generator=generator), "random")


def estimate(model: PreTrainedModel, data: Windows, batch_tokens: int = 24) -> CurvatureFactors:
    layers = match_layers(model).layers
    return kfac(model, layers, data, batch_tokens=batch_tokens, accumulate=torch.float64, advance=lambda _n: None)


def test_factors_equal_a_per_token_loop(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    data = windows()
    factors = estimate(tiny, data)
    layers = match_layers(tiny).layers
    A, G = naive_moments(tiny, {layer.name: layer.module for layer in layers}, list(data.ids))
    assert factors.tokens == 60
    for layer, found in zip(layers, factors.layers, strict=True):
        assert found.A_CC is not None
        assert found.G_RR is not None
        assert found.A_CC.shape == (layer.columns, layer.columns)
        torch.testing.assert_close(found.A_CC, A[layer.name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.G_RR, G[layer.name], rtol=1e-10, atol=1e-12)


def test_factors_equal_curvlinops(tiny: PreTrainedModel) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    freeze(tiny)
    data = windows()
    factors = estimate(tiny, data)
    layers = match_layers(tiny).layers

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2)

    parameters = [p for layer in layers for p in layer.module.parameters(recurse=False)]
    for parameter in parameters:
        parameter.requires_grad_()
    operator = curvlinops.KFACLinearOperator(
        Logits(),
        nn.CrossEntropyLoss(reduction="sum"),
        parameters,
        [(data.ids, data.ids[:, 1:])],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    for layer, found in zip(layers, factors.layers, strict=True):
        assert found.A_CC is not None
        assert found.G_RR is not None
        A = state["input_covariances"][f"inner.{layer.name}"]
        G = state["gradient_covariances"][f"inner.{layer.name}"]
        # Theirs: A is a mean over tokens, up to the number of loss terms; G is a plain sum.
        torch.testing.assert_close(found.A_CC / found.A_CC.trace(), A / A.trace(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.G_RR * factors.tokens, G, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 36, 10_000])
def test_factors_do_not_depend_on_the_batch(tiny: PreTrainedModel, batch_tokens: int) -> None:
    freeze(tiny)
    one = estimate(tiny, windows(), 12)
    other = estimate(tiny, windows(), batch_tokens)
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    for a, b in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(a.A_CC, b.A_CC, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(a.G_RR, b.G_RR, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_padding_is_left_out(make: Callable[[], PreTrainedModel]) -> None:
    """Windows of different lengths, padded on the right, equal the same windows run alone."""
    model = freeze(make())
    ids = windows(3, 12).ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7:] = False
    mask[2, 10:] = False
    padded = estimate(model, Windows(ids, "padded", mask), 36)
    layers = match_layers(model).layers
    A, G = naive_moments(model, {layer.name: layer.module for layer in layers}, [ids[0, :7], ids[1], ids[2, :10]])
    assert padded.tokens == 29
    for layer, found in zip(layers, padded.layers, strict=True):
        torch.testing.assert_close(found.A_CC, A[layer.name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.G_RR, G[layer.name], rtol=1e-9, atol=1e-12)


def test_layers_that_read_the_same_tensor_share_one_moment() -> None:
    model = freeze(tiny_llama())
    by_role = {
        (layer.block, layer.role): found
        for layer, found in zip(match_layers(model).layers, estimate(model, windows()).layers, strict=True)
    }
    for block in (0, 1):
        q, k, v, o = (by_role[block, role] for role in "qkvo")
        assert q.a_key == k.a_key == v.a_key != o.a_key
        assert q.A_CC is not None
        assert k.A_CC is not None
        assert q.A_CC.data_ptr() == k.A_CC.data_ptr()
        assert by_role[block, "gate"].a_key == by_role[block, "up"].a_key != by_role[block, "down"].a_key


def test_no_weight_gradients_and_no_hooks_remain(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    estimate(tiny, windows())
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())
    assert all(not module._forward_hooks for module in tiny.modules())


def test_hooks_are_removed_after_an_error(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    bad = Windows(torch.full((1, 4), VOCABULARY + 5), "beyond the vocabulary")
    with pytest.raises(IndexError):
        estimate(tiny, bad)
    assert all(not module._forward_hooks for module in tiny.modules())


def test_non_finite_activation_names_layer_and_window(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    data = windows(6, 12)
    victim = 95
    ids = torch.where(data.ids == victim, 0, data.ids)
    ids[4, 3] = victim  # only window 4 has it
    first = match_layers(tiny).layers[0].name

    def poison(_m: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == victim)[..., None], float("nan"), out)

    tiny.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(NonFiniteError) as caught:
        estimate(tiny, Windows(ids, "random"), 24)
    assert (caught.value.layer, caught.value.index) == (first, 4)
    assert "input" in str(caught.value)


def test_non_finite_gradient_names_layer_and_window() -> None:
    model = freeze(tiny_llama())
    layers = match_layers(model).layers
    target = layers[7]

    def poison(_m: nn.Module, _a: object, out: torch.Tensor) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoiled = gradient.clone()
            spoiled[1, 2, 0] = float("inf")
            return spoiled

        if out.requires_grad:
            out.register_hook(spoil)

    handle = target.module.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="output gradient") as caught:
        estimate(model, windows(2, 12), 24)
    handle.remove()
    # The gradient of the layer itself is seen before or after the poison; what lies below it is bad.
    assert caught.value.layer in {layer.name for layer in layers[:8]}
    assert caught.value.index == 1


def test_a_layer_that_is_never_reached_is_an_error() -> None:
    model = freeze(tiny_llama())
    orphan = nn.Linear(4, 4, dtype=torch.float64)
    layers = (*match_layers(model).layers, type(match_layers(model).layers[0])("orphan", "up", 9, orphan))
    with pytest.raises(ZeroCurvatureError, match="orphan"):
        kfac(model, layers, windows(), batch_tokens=24, accumulate=torch.float64, advance=lambda _n: None)


def test_all_zero_gradients_are_an_error() -> None:
    model = freeze(tiny_llama(tied=False))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ZeroCurvatureError, match="every layer"):
        estimate(model, windows())


def test_identity_holds_nothing() -> None:
    model = tiny_llama()
    layers = match_layers(model).layers
    factors = identity(model, layers, None, batch_tokens=1, accumulate=torch.float32, advance=lambda _n: None)
    assert [f.A_CC for f in factors.layers] == [None] * len(layers)
