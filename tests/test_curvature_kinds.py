"""Nearest Kronecker sums, Monte-Carlo Fisher and activation curvature against dense, enumerated truths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from surgeon.curvature import (
    CurvatureFactors,
    CurvatureOptions,
    LayerFactors,
    activations,
    estimator_for,
    kfac,
    kron,
)
from surgeon.curvature.kron import _InputStep, _Sum, _Term
from surgeon.curvature.sampling import draw_labels
from surgeon.data import Windows
from surgeon.errors import ConfigError, NonFiniteError, SurgeonError, ZeroCurvatureError
from surgeon.evaluation import IGNORED, shifted_labels
from surgeon.models import match_layers
from tests.conftest import VOCABULARY, tiny_llama, tiny_opt
from tests.oracles.moments import naive_moments, rearranged_fisher, token_pairs, weighted_pairs

V = 7
SAMPLED = CurvatureOptions(fisher="mc", fisher_samples=2, seed=5)


def minute_llama() -> PreTrainedModel:
    """No biases; small enough for its dense Fisher."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        initializer_range=0.6,
    )
    return LlamaForCausalLM(config).eval().double().requires_grad_(False)


def minute_opt() -> PreTrainedModel:
    """With biases."""
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=V,
        hidden_size=4,
        word_embed_proj_dim=4,
        ffn_dim=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        init_std=0.6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config).eval().double().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.4)
    return model


Make = Callable[[], PreTrainedModel]
MINUTE = pytest.mark.parametrize("make", [minute_llama, minute_opt])


def windows(n: int = 4, length: int = 6, vocabulary: int = V) -> Windows:
    generator = torch.Generator().manual_seed(3)
    return Windows(torch.randint(0, vocabulary, (n, length), generator=generator), "random")


def estimate(
    kind: str, model: PreTrainedModel, data: Windows, *, batch_tokens: int = 24, **options: Any
) -> CurvatureFactors:
    chosen = options.pop("options", None) or CurvatureOptions(**options)
    return estimator_for(kind)(
        model,
        match_layers(model).layers,
        data,
        batch_tokens=batch_tokens,
        accumulate=torch.float64,
        advance=lambda _n: None,
        options=chosen,
    )


def modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {layer.name: layer.module for layer in match_layers(model).layers}  # type: ignore[misc]


def fishers(model: PreTrainedModel, data: Windows) -> list[Tensor]:
    """The rearranged dense Fisher of every layer."""
    pairs = token_pairs(model, modules(model), list(data.ids))
    return [rearranged_fisher(a, g, data.ids.numel()) for a, g in pairs.values()]


def rearranged(factors: LayerFactors) -> Tensor:
    """``Σ vec(G_k) vec(A_k)ᵀ``."""
    assert factors.G_RR is not None
    assert factors.A_CC is not None
    terms = [(factors.G_RR, factors.A_CC), *factors.more]
    return torch.stack([torch.outer(G.flatten(), A.flatten()) for G, A in terms]).sum(0)


def truncated(R: Tensor, terms: int) -> Tensor:
    U, s, Vh = torch.linalg.svd(R, full_matrices=False)
    return U[:, :terms] @ torch.diag(s[:terms]) @ Vh[:terms]


def assert_same(one: CurvatureFactors, other: CurvatureFactors, *, rtol: float = 1e-9) -> None:
    assert one.tokens == other.tokens
    assert one.loss == pytest.approx(other.loss, rel=1e-12)
    for a, b in zip(one.layers, other.layers, strict=True):
        assert len(a.more) == len(b.more)
        for X, Y in zip((a.G_RR, a.A_CC, *sum(a.more, ())), (b.G_RR, b.A_CC, *sum(b.more, ())), strict=True):
            assert X is not None
            assert Y is not None
            torch.testing.assert_close(X, Y, rtol=rtol, atol=rtol * float(Y.abs().max()))


# Nearest Kronecker products


@MINUTE
def test_one_term_is_the_leading_singular_pair(make: Make) -> None:
    model, data = make(), windows()
    found = estimate("kron", model, data, iterations=25)
    for R, factors in zip(fishers(model, data), found.layers, strict=True):
        best = truncated(R, 1)
        torch.testing.assert_close(rearranged(factors), best, rtol=0.0, atol=1e-8 * float(best.norm()))
        assert factors.G_RR is not None
        assert factors.A_CC is not None
        assert float(factors.G_RR.norm()) == pytest.approx(float(factors.A_CC.norm()), rel=1e-10)


@MINUTE
def test_a_sum_is_the_truncated_singular_value_decomposition(make: Make) -> None:
    model, data = make(), windows()
    found = estimate("kron", model, data, iterations=20, terms=3)
    for R, factors in zip(fishers(model, data), found.layers, strict=True):
        assert len(factors.more) == 2
        best, F = truncated(R, 3), rearranged(factors)
        # The third and fourth singular value of one layer are close: its error is still settled, its direction less.
        assert float((R - F).norm()) <= (1 + 1e-4) * float((R - best).norm()) + 1e-12
        torch.testing.assert_close(F, best, rtol=0.0, atol=5e-3 * float(best.norm()))


@MINUTE
def test_few_iterations_are_nearer_than_kfac_and_every_term_helps(make: Make) -> None:
    model, data = make(), windows()
    dense = fishers(model, data)

    def errors(factors: CurvatureFactors) -> list[float]:
        return [float((R - rearranged(f)).norm()) for R, f in zip(dense, factors.layers, strict=True)]

    iad = errors(estimate("kfac", model, data))
    ladder = [iad] + [errors(estimate("kron", model, data, iterations=1, terms=k)) for k in (1, 2, 3)]
    for more, fewer in zip(ladder[1:], ladder, strict=False):
        assert all(b < 0.995 * a for a, b in zip(fewer, more, strict=True))
    again = errors(estimate("kron", model, data, iterations=4))
    assert all(b <= a * (1 + 1e-12) for a, b in zip(ladder[1], again, strict=True))


def test_two_iterations_of_two_terms_leave_little_more_than_the_best(tiny: PreTrainedModel) -> None:
    """The start of the second term is worth iterations: K-FAC's A in its place misses both bounds in one family."""
    model = tiny.double().requires_grad_(False)
    data = windows(6, 12, VOCABULARY)
    pairs = token_pairs(model, modules(model), list(data.ids))
    found = estimate("kron", model, data, terms=2)
    ratios = []
    for (a, g), factors in zip(pairs.values(), found.layers, strict=True):
        # The rearranged Fisher at once: its dense form would not fit a test.
        R = torch.einsum("ni,nj,nk,nl->ijkl", g, g, a, a).reshape(g.shape[1] ** 2, a.shape[1] ** 2) / len(a)
        ratios.append(float((R - rearranged(factors)).norm() / torch.linalg.svdvals(R)[2:].norm()))
    assert max(ratios) < 1.11
    assert sum(ratios) / len(ratios) < 1.02


@MINUTE
def test_the_first_term_is_positive_semi_definite_and_all_are_symmetric(make: Make) -> None:
    for factors in estimate("kron", make(), windows(), terms=2).layers:
        assert factors.G_RR is not None
        assert factors.A_CC is not None
        for M in (factors.G_RR, factors.A_CC):
            assert float(torch.linalg.eigvalsh(M)[0]) > -1e-12 * float(M.norm())
        for M in (factors.G_RR, factors.A_CC, *sum(factors.more, ())):
            torch.testing.assert_close(M, M.T, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("options", [CurvatureOptions(terms=2), CurvatureOptions("mc", 2, terms=2)], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_kron_does_not_depend_on_batch_or_padding(make: Callable[[], PreTrainedModel], options: Any) -> None:
    model = make().double().requires_grad_(False)
    ids = windows(3, 12, VOCABULARY).ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 7:] = False
    mask[2, 10:] = False
    padded = Windows(ids, "padded", mask)
    other = Windows(torch.where(mask, ids, 5), "other padding", mask)
    one = estimate("kron", model, padded, batch_tokens=36, options=options)
    assert one.tokens == 29
    assert_same(one, estimate("kron", model, other, batch_tokens=12, options=options), rtol=1e-7)


def test_padded_kron_is_that_of_the_windows_alone() -> None:
    model = minute_opt()
    ids = windows(3, 6).ids
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 4:] = False
    found = estimate("kron", model, Windows(ids, "padded", mask), iterations=25)
    pairs = token_pairs(model, modules(model), [ids[0], ids[1, :4], ids[2]])
    for (a, g), factors in zip(pairs.values(), found.layers, strict=True):
        best = truncated(rearranged_fisher(a, g, 16), 1)
        torch.testing.assert_close(rearranged(factors), best, rtol=0.0, atol=1e-7 * float(best.norm()))


def test_terms_end_where_nothing_is_left() -> None:
    """Windows of two tokens: one gradient each, so one window's Fisher is one product, two windows' are two."""
    model = minute_llama()
    for count in (1, 2):
        data = windows(count, 2)
        ranks = []
        for R, factors in zip(fishers(model, data), estimate("kron", model, data, terms=4).layers, strict=True):
            s = torch.linalg.svdvals(R)
            ranks.append(int((s > 1e-12).sum()))
            assert len(factors.more) == max(ranks[-1] - 1, 0)
            torch.testing.assert_close(rearranged(factors), R, rtol=0.0, atol=1e-12)
        assert ranks == [0, 0] + [count] * 5  # a first token attends to itself alone: q and k get no gradient


def test_a_layer_without_gradients_has_zero_factors() -> None:
    model = minute_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
    found = {
        layer.role: factors
        for layer, factors in zip(
            match_layers(model).layers, estimate("kron", model, windows(), terms=2).layers, strict=True
        )
    }
    for role in ("gate", "up"):
        assert found[role].G_RR is not None
        assert found[role].G_RR.shape == (6, 6)
        assert found[role].A_CC is not None
        assert found[role].A_CC.shape == (4, 4)
        assert not found[role].G_RR.any()
        assert not found[role].A_CC.any()
        assert found[role].more == ()
    assert len(found["down"].more) == 1


def test_all_zero_gradients_are_an_error() -> None:
    model = tiny_llama(tied=False).double().requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(ZeroCurvatureError, match="every layer"):
        estimate("kron", model, windows(2, 6, VOCABULARY))


def test_no_two_layers_of_kron_share_an_a() -> None:
    layers = estimate("kron", minute_llama(), windows()).layers
    assert len({factors.a_key for factors in layers}) == len(layers)
    assert len({factors.A_CC.data_ptr() for factors in layers if factors.A_CC is not None}) == len(layers)


@pytest.mark.parametrize("kind", ["kfac", "kron", "activations"])
def test_progress_adds_up_to_the_windows_and_passes_are_as_documented(kind: str) -> None:
    model = minute_llama()
    forwards: list[int] = []
    model.register_forward_hook(lambda _m, _a, _o: forwards.append(1))
    told: list[int] = []
    estimator_for(kind)(
        model,
        match_layers(model).layers,
        windows(5),
        batch_tokens=6,
        accumulate=torch.float64,
        advance=told.append,
        options=CurvatureOptions(terms=2, iterations=3),
    )
    assert sum(told) == 5
    assert min(told) > 0
    assert len(forwards) == 1 + 5 * (1 + 2 * 3 * 2 if kind == "kron" else 1)  # one is the probe


def test_progress_is_complete_where_terms_end_early() -> None:
    model = minute_llama()
    told: list[int] = []
    layers = match_layers(model).layers
    kron(
        model,
        layers,
        windows(1, 2),
        batch_tokens=6,
        accumulate=torch.float64,
        advance=told.append,
        options=CurvatureOptions(terms=9),
    )
    assert told == [1]


def test_inputs_are_let_go_when_the_last_gradient_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    take = _InputStep._take_gradient

    def watched(self: _InputStep, index: int, X_NR: Tensor) -> None:
        take(self, index, X_NR)
        held.append(len(self._kept))

    monkeypatch.setattr(_InputStep, "_take_gradient", watched)
    model = minute_llama()
    count = len(match_layers(model).layers)
    estimate("kron", model, windows(), batch_tokens=24, iterations=1, options=None)
    assert held == list(reversed(range(count)))
    held.clear()
    estimate("kron", model, windows(), batch_tokens=24, options=CurvatureOptions("mc", 3, iterations=1))
    assert held == [count] * 2 * count + list(reversed(range(count)))


def test_inputs_that_the_model_overwrites_are_an_error() -> None:
    model = minute_llama()
    mlp = model.model.layers[0].mlp

    def overwrite(_m: nn.Module, args: tuple[Tensor], _o: Tensor) -> None:
        args[0].detach().mul_(2.0)  # what gate and up have read

    mlp.register_forward_hook(overwrite)
    with pytest.raises(SurgeonError, match=r"layers\.0\.mlp\.(gate|up)_proj in place"):
        estimate("kron", model, windows())
    assert not mlp.up_proj._forward_hooks


def test_a_sum_that_overflows_is_an_error() -> None:
    layer = match_layers(minute_llama()).layers[0]
    R, C = layer.shape
    each = _Sum(layer, term=_Term((torch.full((R, R), float("inf")), torch.eye(C))))
    with pytest.raises(NonFiniteError, match=r"factor G of layer model\.layers\.0") as caught:
        each.finish_half_step(0, 1)
    assert caught.value.layer == layer.name


# Monte-Carlo Fisher


def test_labels_are_drawn_with_the_models_probabilities() -> None:
    log_p = torch.log_softmax(torch.tensor([[[1.0, 0.0, -1.0, float("-inf")], [0.0, 0.0, 3.0, -2.0]]]).double(), -1)
    labels = torch.zeros(1, 2, dtype=torch.int64)
    drawn = draw_labels(log_p, labels, seed=0, first_window=0, samples=4000)
    for t in range(2):
        p = log_p[0, t].exp()
        frequency = torch.bincount(drawn[:, 0, t], minlength=4) / 4000
        assert float((frequency - p).abs().max()) < 4 * 0.5 / 4000**0.5
    assert not (drawn[:, 0, 0] == 3).any()
    # Places are independent of one another: no more agreement than chance gives.
    together = float((drawn[:, 0, 0] == drawn[:, 0, 1]).double().mean())
    chance = float((log_p[0, 0].exp() * log_p[0, 1].exp()).sum())
    assert together == pytest.approx(chance, abs=4 * 0.5 / 4000**0.5)


def test_draws_belong_to_seed_window_sample_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = torch.log_softmax(torch.randn(3, 9, 50, generator=torch.Generator().manual_seed(0)).double(), -1)
    labels = torch.zeros(3, 9, dtype=torch.int64)
    labels[:, -1] = IGNORED
    labels[1, 4:] = IGNORED
    drawn = draw_labels(log_p, labels, seed=3, first_window=7, samples=3)
    assert drawn.shape == (3, 3, 9)
    assert torch.equal(drawn == IGNORED, (labels == IGNORED).expand(3, 3, 9))
    alone = draw_labels(log_p[2:], labels[2:], seed=3, first_window=9, samples=2)
    assert torch.equal(alone[:, 0], drawn[:2, 2])
    shorter = draw_labels(log_p[:1, :5], labels[:1, :5], seed=3, first_window=7, samples=1)
    assert torch.equal(shorter[0, 0], drawn[0, 0, :5])
    monkeypatch.setattr("surgeon.curvature.sampling._CHUNK", 100)
    assert torch.equal(draw_labels(log_p, labels, seed=3, first_window=7, samples=3), drawn)
    assert not torch.equal(draw_labels(log_p, labels, seed=4, first_window=7, samples=3), drawn)
    assert not torch.equal(drawn[0], drawn[1])


def drawn_labels(model: PreTrainedModel, data: Windows, options: CurvatureOptions) -> list[list[Tensor]]:
    """By sample, then by window, as the estimators draw them."""
    log_p = model(input_ids=data.ids, use_cache=False).logits.log_softmax(-1)
    drawn = draw_labels(
        log_p,
        shifted_labels(data.ids, None),
        seed=options.seed,
        first_window=0,
        samples=options.fisher_samples,
    )
    return [list(each[:, :-1]) for each in drawn]


@MINUTE
def test_sampled_g_is_the_mean_of_outer_products(make: Make) -> None:
    model, data = make(), windows()
    options = CurvatureOptions(fisher="mc", fisher_samples=3, seed=11)
    found = estimate("kfac", model, data, options=options)
    draws = [naive_moments(model, modules(model), list(data.ids), d)[1] for d in drawn_labels(model, data, options)]
    plain = estimate("kfac", model, data)
    assert found.loss == plain.loss
    for layer, factors, empirical in zip(match_layers(model).layers, found.layers, plain.layers, strict=True):
        assert factors.G_RR is not None
        assert empirical.G_RR is not None
        expected = torch.stack([G[layer.name] for G in draws]).mean(0)
        torch.testing.assert_close(factors.G_RR, expected, rtol=1e-9, atol=1e-12)
        assert float((factors.G_RR - empirical.G_RR).norm()) > 0.01 * float(expected.norm())
        torch.testing.assert_close(factors.A_CC, empirical.A_CC, rtol=0.0, atol=0.0)


@MINUTE
def test_sampled_kron_sees_the_same_draws_in_every_pass(make: Make) -> None:
    model, data = make(), windows(3)
    options = CurvatureOptions(fisher="mc", fisher_samples=2, seed=11, iterations=25)
    found = estimate("kron", model, data, options=options)
    draws = [token_pairs(model, modules(model), list(data.ids), d) for d in drawn_labels(model, data, options)]
    for layer, factors in zip(match_layers(model).layers, found.layers, strict=True):
        a, g = (torch.cat([pairs[layer.name][side] for pairs in draws]) for side in (0, 1))
        best = truncated(rearranged_fisher(a, g, len(a)), 1)
        torch.testing.assert_close(rearranged(factors), best, rtol=0.0, atol=1e-7 * float(best.norm()))


def exact_g(model: PreTrainedModel, data: Windows) -> list[Tensor]:
    pairs = weighted_pairs(model, modules(model), list(data.ids))
    return [g.T @ g / data.ids.numel() for _, g in pairs.values()]


def relative_errors(factors: CurvatureFactors, exact: list[Tensor]) -> list[float]:
    return [float((f.G_RR - G).norm() / G.norm()) for f, G in zip(factors.layers, exact, strict=True)]  # type: ignore[operator]


@MINUTE
def test_more_samples_approach_the_exact_fisher(make: Make) -> None:
    model, data = make(), windows()
    exact = exact_g(model, data)
    few, many = (
        torch.tensor(relative_errors(estimate("kfac", model, data, fisher="mc", fisher_samples=n), exact))
        for n in (10, 400)
    )
    assert float(many.mean()) < 0.35 * float(few.mean())  # one over the root of 40 is 0.16
    assert float(many.max()) < 0.12


def test_two_samples_are_unbiased() -> None:
    """The outer product of a mean of two would be half as large."""
    model, data = minute_llama(), windows(2)
    exact = exact_g(model, data)
    sums = [torch.zeros_like(G) for G in exact]
    for seed in range(60):
        found = estimate("kfac", model, data, fisher="mc", fisher_samples=2, seed=seed)
        for i, factors in enumerate(found.layers):
            assert factors.G_RR is not None
            sums[i] += factors.G_RR / 60
    for mean, G in zip(sums, exact, strict=True):
        assert float((mean - G).norm()) < 0.25 * float(G.norm())


def test_sampled_kron_approaches_the_nearest_product_of_the_exact_fisher() -> None:
    model, data = minute_opt(), windows(3)
    pairs = weighted_pairs(model, modules(model), list(data.ids))
    found = estimate("kron", model, data, fisher="mc", fisher_samples=60, iterations=2)
    for (a, g), factors in zip(pairs.values(), found.layers, strict=True):
        best = truncated(rearranged_fisher(a, g, data.ids.numel()), 1)
        assert float((rearranged(factors) - best).norm()) < 0.25 * float(best.norm())


@pytest.mark.parametrize("kind", ["kfac", "kron"])
def test_draws_do_not_depend_on_the_batch(kind: str, tiny: PreTrainedModel) -> None:
    model = tiny.double().requires_grad_(False)
    data = windows(4, 12, VOCABULARY)
    one = estimate(kind, model, data, batch_tokens=12, options=SAMPLED)
    assert_same(one, estimate(kind, model, data, batch_tokens=48, options=SAMPLED))
    other = estimate(kind, model, data, batch_tokens=12, fisher="mc", fisher_samples=2, seed=6)
    assert not torch.equal(one.layers[0].G_RR, other.layers[0].G_RR)  # type: ignore[arg-type]


# Activations, options, and what must not change


def test_activations_are_those_of_kfac_without_a_backward_pass(tiny: PreTrainedModel) -> None:
    model = tiny.double().requires_grad_(False)
    data = windows(4, 12, VOCABULARY)
    layers = match_layers(model).layers

    def no_gradient(_m: nn.Module, _a: object, out: Tensor) -> None:
        assert not torch.is_grad_enabled()

    plain = estimate("kfac", model, data)
    handle = layers[0].module.register_forward_hook(no_gradient)
    found = activations(
        model, layers, data, batch_tokens=24, accumulate=torch.float64, advance=lambda _n: None, options=SAMPLED
    )
    handle.remove()
    assert (found.loss, found.tokens) == (plain.loss, plain.tokens)
    for a, k in zip(found.layers, plain.layers, strict=True):
        assert a.G_RR is None
        assert a.A_CC is not None
        assert k.A_CC is not None
        assert a.a_key == k.a_key
        assert torch.equal(a.A_CC, k.A_CC)
    assert all(not layer.module._forward_hooks for layer in layers)


def test_the_empirical_fisher_is_what_kfac_gives_without_options(tiny: PreTrainedModel) -> None:
    model = tiny.double().requires_grad_(False)
    data = windows(4, 12, VOCABULARY)
    layers = match_layers(model).layers
    one = kfac(model, layers, data, batch_tokens=24, accumulate=torch.float64, advance=lambda _n: None)
    other = estimate("kfac", model, data, batch_tokens=24, fisher_samples=3, terms=2, iterations=5, seed=9)
    assert one.loss == other.loss
    for a, b in zip(one.layers, other.layers, strict=True):
        assert torch.equal(a.A_CC, b.A_CC)  # type: ignore[arg-type]
        assert torch.equal(a.G_RR, b.G_RR)  # type: ignore[arg-type]
        assert a.more == b.more == ()


@pytest.mark.parametrize(
    "bad", [{"fisher": "true"}, {"fisher_samples": 0}, {"terms": 0}, {"iterations": 0}, {"seed": -1}], ids=str
)
def test_options_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad)).replace("fisher", "(?i:fisher)")):
        CurvatureOptions(**bad)


@pytest.mark.parametrize("kind", ["kfac", "kron", "activations"])
def test_a_kind_that_needs_windows_says_so(kind: str) -> None:
    with pytest.raises(ConfigError, match="needs calibration windows"):
        estimate(kind, minute_llama(), None)  # type: ignore[arg-type]
