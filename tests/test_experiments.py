"""Variants in benches/experiments against slow truths: a comparison is worth what the variant is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))

from experiments import depth, ekfac, lowrank, plan, refit
from surgeon import PruneConfig, costs
from surgeon.curvature import CurvatureOptions, estimator_for
from surgeon.curvature.passes import run_pass
from surgeon.data import Windows
from surgeon.linalg import damped_cholesky, inverse_diagonal
from surgeon.models import match_layers
from surgeon.schedule import Ledger
from surgeon.update import remove_elements
from tests.conftest import TINY, VOCABULARY

CONFIG = PruneConfig(damping_g=0.1, damping_a=0.01)


@pytest.fixture(params=sorted(TINY))
def parts(request):
    model = TINY[request.param]()
    model.requires_grad_(requires_grad=False)
    ids = torch.randint(0, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, "random")
    matched = match_layers(model)
    factors = estimator_for("kfac")(
        model, matched.layers, windows, batch_tokens=32, accumulate=torch.float32, advance=lambda _: None
    )
    return model, matched, windows, factors


def damped(M, relative):
    return M.double() + relative * M.double().diagonal().mean() * torch.eye(len(M), dtype=torch.float64)


def test_eigenvalues_of_kfac_give_kfac_costs(parts):
    _, matched, _, factors = parts
    for layer, f in zip(matched.layers, factors.layers, strict=True):
        W = layer.read(torch.float64)
        basis = ekfac.Basis.of(W, f, CONFIG)
        a = inverse_diagonal(damped_cholesky(f.A_CC.double(), 0.01, what="A").L_nn)
        g = inverse_diagonal(damped_cholesky(f.G_RR.double(), 0.1, what="G").L_nn)
        torch.testing.assert_close(
            0.5 * W.square() / basis.inverse_diagonal(), costs.element_costs_obs(W, g, a), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(
            basis.column_costs(W), costs.column_costs_obs(W, f.G_RR.double(), a), rtol=1e-4, atol=1e-9
        )
        keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        G, A = damped(f.G_RR, 0.1), damped(f.A_CC, 0.01)
        best = remove_elements(W, keep, [(G, A)], steps=500, tolerance=0.0).increases[-1]
        new = basis.solve(W.float(), keep).double()
        assert not new[~keep].any()
        assert float(costs.quadratic_increase(new - W, A, G)) < 1.03 * best


def test_eigenvalues_are_moments_of_each_token(parts):
    model, matched, windows, factors = parts
    layers = matched.layers
    bases = [
        ekfac.Basis.of(layer.read(torch.float32), f, CONFIG) for layer, f in zip(layers, factors.layers, strict=True)
    ]
    with ekfac.EigenvalueCollector(layers, bases) as collector:
        run_pass(model, windows, collector, batch_tokens=32, advance=lambda _: None, options=CurvatureOptions())
    inputs, gradients = {}, {}
    handles = []
    for index, layer in enumerate(layers):

        def hook(_module, args, output, index=index):
            inputs[index] = args[0].detach().flatten(0, -2)
            output.requires_grad_() if not output.requires_grad else None
            output.register_hook(lambda g: gradients.__setitem__(index, g.detach().flatten(0, -2)))

        handles.append(layer.module.register_forward_hook(hook))
    logits = model(input_ids=windows.ids).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), windows.ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for index, (layer, basis) in enumerate(zip(layers, bases, strict=True)):
        truth = torch.zeros(basis.Lambda_RC.shape, dtype=torch.float64)
        for a, g in zip(inputs[index].double(), gradients[index].double(), strict=True):
            a1 = torch.cat([a, a.new_ones(1)]) if layer.has_bias else a
            left, right = basis.U_RR.T @ g[basis.rows], basis.U_CC.T @ a1[basis.columns]
            truth += torch.outer(left.square(), right.square())
        truth /= windows.ids.numel()
        torch.testing.assert_close(collector.sums[index].double() / collector.tokens, truth, rtol=1e-3, atol=1e-9)


def test_low_rank_is_the_optimum_and_full_rank_the_layer(parts):
    _, matched, _, factors = parts
    for layer, f in zip(matched.layers, factors.layers, strict=True):
        W = layer.read(torch.float64)
        G = damped(f.G_RR, 0.1)
        spectrum = lowrank.Spectrum.of(layer, f, CONFIG)
        rank = spectrum.sigma.numel()
        full = (spectrum.left * spectrum.sigma) @ spectrum.right
        torch.testing.assert_close(full, layer.weight.double(), rtol=0, atol=1e-8)
        low = spectrum.at(rank // 4, W)
        assert int(torch.linalg.matrix_rank(low[:, : layer.inputs], rtol=1e-6)) == rank // 4
        A = f.A_CC.double().clone()
        inner = A[: layer.inputs, : layer.inputs]
        centred = inner - (A[:-1, -1:] @ A[-1:, :-1] if layer.has_bias else 0.0)
        inner.diagonal().add_(0.01 * centred.diagonal().mean())

        def loss(X, A=A, G=G, W=W):
            return float(costs.quadratic_increase(X - W, A, G))

        tail = 0.5 * float(spectrum.sigma[rank // 4 :].square().sum())
        assert loss(low) == pytest.approx(tail, rel=1e-8)
        generator = torch.Generator().manual_seed(2)
        U, s, Vh = torch.linalg.svd(low[:, : layer.inputs], full_matrices=False)
        for _ in range(5):  # any other matrix of that rank, and any other bias, is worse
            left = U[:, : rank // 4] * s[: rank // 4]
            left = left + 1e-3 * torch.randn(left.shape, generator=generator, dtype=torch.float64)
            right = Vh[: rank // 4] + 1e-3 * torch.randn(
                Vh[: rank // 4].shape, generator=generator, dtype=torch.float64
            )
            bias = low[:, layer.inputs :]
            bias = bias + 1e-3 * torch.randn(bias.shape, generator=generator, dtype=torch.float64)
            assert loss(torch.cat([left @ right, bias], 1)) > loss(low)


@pytest.mark.parametrize("choose", [lowrank.ranks_by_threshold, lowrank.ranks_by_price])
def test_ranks_meet_the_target(parts, choose):
    _, matched, _, factors = parts
    spectra = [lowrank.Spectrum.of(layer, f, CONFIG) for layer, f in zip(matched.layers, factors.layers, strict=True)]
    total = sum(s.shape[0] * s.shape[1] for s in spectra)
    assert lowrank.freed(spectra, choose(spectra, 0)) == 0
    for target in (total // 5, total // 2):
        freed = lowrank.freed(spectra, choose(spectra, target))
        assert target <= freed < target + total // 10


@pytest.mark.parametrize("stream", [False, True])
def test_least_squares_leave_an_unpruned_model_alone_and_mend_a_pruned_one(parts, stream):
    model, matched, windows, _ = parts
    dense = type(model)(model.config).eval()
    dense.load_state_dict(model.state_dict())
    before = [layer.read(torch.float64) for layer in matched.layers]

    def run():
        refit.refit((model, matched), (dense, match_layers(dense)), windows, batch_tokens=32, stream=stream, ridge=1e-4)

    run()
    for layer, W in zip(matched.layers, before, strict=True):
        torch.testing.assert_close(layer.read(torch.float64), W, rtol=0, atol=1e-4)
    output = next(i for i, layer in enumerate(matched.layers) if layer.role in {"down", "fc2"})
    layer = matched.layers[output]
    W = layer.read(torch.float32)
    W[:, :8] = 0.0
    layer.write(W)

    def distance():
        with torch.no_grad():
            return float((model(input_ids=windows.ids).logits - dense(input_ids=windows.ids).logits).square().mean())

    broken = distance()
    run()
    assert not layer.weight[:, :8].any()
    assert distance() < 0.9 * broken


def test_a_sublayer_goes_whole(parts):
    model, matched, windows, factors = parts
    groups = depth.sublayers(matched)
    assert sum(group.unit_size(matched.layers) for group in groups) == matched.parameters - sum(
        layer.rows for layer in matched.layers if layer.has_bias and layer.role in {"o", "fc2"}
    )
    config = PruneConfig(structure="neurons,heads", sparsity=0.2, shots=1)
    ledger = Ledger([layer.shape for layer in matched.layers])
    shot = depth.CoupledShot(matched.layers, groups, config, ledger)
    for index, layer in enumerate(matched.layers):
        shot.measure(index, layer.read(torch.float32), factors.layers[index])
    for number, group in enumerate(groups):  # with all inputs gone nothing is left to adapt but the bias
        layer, f = matched.layers[group.output], factors.layers[group.output]
        W, G, A = layer.read(torch.float64), f.G_RR.double(), damped(f.A_CC, config.damping_a)
        if layer.has_bias:
            A = A[:-1, :-1] - A[:-1, -1:] @ A[-1:, :-1] / A[-1, -1]
        W = W[:, : layer.inputs]
        assert float(shot._costs[number][0]) == pytest.approx(0.5 * float(torch.trace(G @ W @ A @ W.T)), rel=1e-3)
    shot.select(matched.parameters // 5)
    for index, layer in enumerate(matched.layers):
        layer.write(shot.apply(index, layer.read(torch.float32), factors.layers[index]).W_RC)
    shot.commit(ledger)
    gone = [group for group in groups if not matched.layers[group.output].weight.any()]
    assert ledger.removed == sum(group.unit_size(matched.layers) for group in gone) >= matched.parameters // 5
    assert bool(torch.isfinite(model(input_ids=windows.ids).logits).all())


def test_names_are_unique_and_every_comparison_is_run():
    trials = {trial.name: trial for trial in plan.trials(None)}
    for comparison in plan.comparisons():
        assert trials[comparison.default.name] == comparison.default
        assert trials[comparison.variant.name].changes == comparison.variant.changes
    seen = set()
    for name, trial in trials.items():
        assert trial.match is None or trial.match in seen
        seen.add(name)
