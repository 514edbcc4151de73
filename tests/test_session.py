"""The shot loop on tiny models: targets met, optimum reached, dead units taken along, weights exactly zero."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from surgeon.config import PruneConfig
from surgeon.curvature import kfac
from surgeon.data import Windows
from surgeon.errors import ConfigError
from surgeon.models import LoadedModel, match_layers
from surgeon.session import Session
from tests.conftest import VOCABULARY, tiny_llama, tiny_opt
from tests.oracles.dense import damped, kkt_optimum


def windows(n: int = 6, length: int = 16, seed: int = 3) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(0, VOCABULARY, (n, length), generator=generator), "random")


def session(model: PreTrainedModel, **settings: object) -> Session:
    config = PruneConfig(**{"precision": "float64", "sequence_length": 16, "shots": 3, **settings})  # type: ignore[arg-type]
    model = model.to(torch.float64).requires_grad_(False)
    loaded = LoadedModel(model, torch.float64, "tiny")
    return Session(loaded, match_layers(model), calibration=windows(), test=windows(seed=4), config=config)


@pytest.mark.parametrize("structure", ["rows-columns", "rows", "columns"])
@pytest.mark.parametrize("method", ["surgeon", "k-obd", "magnitude"])
def test_every_method_meets_its_target_with_exact_zeros(tiny: PreTrainedModel, structure: str, method: str) -> None:
    run = session(tiny, structure=structure, method=method, sparsity=0.4)
    state = run.run()
    assert [record.shot for record in state.shots] == [1, 2, 3]
    for record in state.shots:
        assert record.sparsity >= record.target_sparsity
        assert record.sparsity < record.target_sparsity + 0.02  # one row or column too many at most
    counted = 0
    for index, layer in enumerate(run.layers):
        W = layer.read(torch.float64)
        rows = torch.from_numpy(state.ledger.keep_rows(index))
        columns = torch.from_numpy(state.ledger.keep_columns(index))
        assert (W[~rows] == 0).all()
        assert (W[:, ~columns] == 0).all()
        assert not torch.signbit(W[W == 0]).any()
        n_r, n_c = int((~rows).sum()), int((~columns).sum())
        counted += n_r * layer.columns + n_c * layer.rows - n_r * n_c
        # Only what dead partners took along may have gone of the other kind: it was read as zero.
        if method == "magnitude" and structure == "rows":
            assert columns.all() or not rows.any()
        if method == "magnitude" and structure == "columns":
            assert rows.all() or not columns.any()
    assert counted == state.ledger.removed


def test_one_shot_reaches_the_dense_optimum(tiny: PreTrainedModel) -> None:
    """Every layer's new weights are the KKT optimum for the units that the selection took."""
    run = session(tiny, shots=1, sparsity=0.35)
    before = [layer.read(torch.float64) for layer in run.layers]
    factors = kfac(run.model, run.layers, windows(), batch_tokens=64, accumulate=torch.float64, advance=lambda _n: None)
    state = run.run()
    for index, layer in enumerate(run.layers):
        keep = torch.from_numpy(state.ledger.keep_rows(index))[:, None] & torch.from_numpy(
            state.ledger.keep_columns(index)
        )
        A, G = factors.layers[index].A_CC, factors.layers[index].G_RR
        assert A is not None
        assert G is not None
        # Some units are dead (a ReLU that never fires): they leave before anything is damped.
        r, c = G.diagonal().nonzero().flatten(), A.diagonal().nonzero().flatten()
        expected = torch.zeros_like(before[index])
        expected[r[:, None], c] = kkt_optimum(
            before[index][r[:, None], c],
            keep[r[:, None], c],
            damped(G[r[:, None], r], 0.1),
            damped(A[c[:, None], c], 0.01),
        )
        torch.testing.assert_close(layer.read(torch.float64), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_dead_units_take_their_partners_along(make: object) -> None:
    """An MLP unit whose first row is gone kills its column in the next layer, one shot later."""
    model = make()  # type: ignore[operator]
    matched = match_layers(model)
    by_role = {(layer.block, layer.role): i for i, layer in enumerate(matched.layers)}
    first = by_role.get((0, "up"), by_role.get((0, "fc1")))
    second = by_role.get((0, "down"), by_role.get((0, "fc2")))
    assert first is not None
    assert second is not None
    module = matched.layers[first].module
    with torch.no_grad():
        module.weight[5] = 0
        if module.bias is not None:
            module.bias[5] = 0
    run = session(model, shots=1, sparsity=0.01)
    state = run.run()
    assert not state.ledger.keep_rows(first)[5]
    assert not state.ledger.keep_columns(second)[5]
    assert (run.layers[second].module.weight[:, 5] == 0).all()


def test_a_unit_that_the_gradient_never_reaches_is_dead() -> None:
    """A zero down column makes the gradient of its gate and up rows exactly zero."""
    model = tiny_llama()
    matched = match_layers(model)
    index = {(layer.block, layer.role): i for i, layer in enumerate(matched.layers)}
    with torch.no_grad():
        matched.layers[index[1, "down"]].module.weight[:, 7] = 0
    state = session(model, shots=1, sparsity=0.01).run()
    assert not state.ledger.keep_columns(index[1, "down"])[7]
    assert not state.ledger.keep_rows(index[1, "gate"])[7]
    assert not state.ledger.keep_rows(index[1, "up"])[7]


def test_almost_everything_can_go(tiny: PreTrainedModel) -> None:
    """Fully pruned layers on the way are no error, and the model still runs."""
    state = session(tiny, sparsity=0.97, shots=4).run()
    assert state.ledger.sparsity >= 0.97
    assert state.shots[-1].perplexity is not None


def test_zero_sparsity_changes_nothing() -> None:
    run = session(tiny_llama(), sparsity=0.0, shots=2)  # every unit of this one is alive
    before = [layer.read(torch.float64) for layer in run.layers]
    state = run.run()
    assert state.ledger.removed == 0
    assert state.shots[-1].threshold is None
    for layer, old in zip(run.layers, before, strict=True):
        assert torch.equal(layer.read(torch.float64), old)


def test_layers_that_nothing_reads_are_dead() -> None:
    """Without an output projection the loss does not see q, k and v: they go, and the report shows it."""
    model = tiny_llama()
    matched = match_layers(model)
    o = next(layer for layer in matched.layers if (layer.block, layer.role) == (0, "o"))
    with torch.no_grad():
        o.module.weight.zero_()
    state = session(model, shots=1, sparsity=0.1).run()
    for index, layer in enumerate(matched.layers):
        gone = (layer.block, layer.role) in {(0, role) for role in "qkvo"}
        assert (state.ledger.keep_rows(index).sum() == 0) == gone, layer.name


def test_climbs_of_the_damping_ladder_are_recorded() -> None:
    """More inputs than tokens and no damping: A is singular, q, k and v share it, each is told of."""
    model = tiny_llama()
    run = session(model, shots=1, sparsity=0.1, damping_a=0.0, damping_g=0.1)
    run._calibration = windows(1, 8)
    events = run.run().shots[0].damping_events
    told = {(event["layer"].rpartition(".")[2], event["factor"]) for event in events}
    assert {("q_proj", "A"), ("k_proj", "A"), ("v_proj", "A")} <= told
    assert all(event["asked"] == 0.0 and event["used"] > 0 and event["step"] >= 1 for event in events)
    assert {event["factor"] for event in events} == {"A"}


def test_losses_and_prediction_are_recorded(tiny: PreTrainedModel) -> None:
    state = session(tiny, sparsity=0.3, shots=2).run()
    first, second = state.shots
    assert first.loss_after == second.loss_before
    assert second.loss_after is not None
    assert first.predicted_loss_increase is not None
    assert first.predicted_loss_increase > 0
    assert set(first.seconds) == {"curvature", "costs", "select", "update", "evaluate"}


def test_result_does_not_depend_on_the_batch_size(tiny: PreTrainedModel) -> None:
    import copy

    other = copy.deepcopy(tiny)
    a, b = session(tiny, batch_tokens=16), session(other, batch_tokens=64)
    ledgers = a.run().ledger, b.run().ledger
    assert ledgers[0] == ledgers[1]
    for x, y in zip(a.layers, b.layers, strict=True):
        torch.testing.assert_close(x.read(torch.float64), y.read(torch.float64), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("structure", ["rows-columns", "neurons", "weights", "2:4"])
@pytest.mark.parametrize(
    "curvature",
    [
        {"curvature": "kron"},
        {"curvature": "kron", "kronecker_terms": 2, "damping_g": 1.0, "damping_a": 1.0},
        {"curvature": "activations"},
        {"fisher": "mc", "fisher_samples": 2},
        {"method": "k-obd", "curvature": "kron", "kronecker_terms": 3},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_curvature_prunes_every_structure(structure: str, curvature: dict[str, object]) -> None:
    state = session(tiny_llama(), structure=structure, sparsity=0.3, shots=1, **curvature).run()
    assert 0.3 <= state.ledger.sparsity < 0.34
    assert state.shots[0].predicted_loss_increase is not None
    assert 0 < state.shots[0].predicted_loss_increase < 100


@pytest.mark.parametrize("structure", ["rows-columns", "neurons", "weights"])
def test_two_terms_reach_the_dense_optimum(structure: str) -> None:
    """With F = G₁⊗A₁ + G₂⊗A₂ what stays is the optimum of that model, by a dense solve."""
    from surgeon.curvature import CurvatureOptions, kron

    settings = {"structure": structure, "curvature": "kron", "kronecker_terms": 2, "damping_g": 1.0, "damping_a": 1.0}
    run = session(tiny_llama(), shots=1, sparsity=0.3, **settings)
    before = [layer.read(torch.float64) for layer in run.layers]
    factors = kron(
        run.model,
        run.layers,
        windows(),
        batch_tokens=2048,
        accumulate=torch.float64,
        advance=lambda _n: None,
        options=CurvatureOptions(terms=2),
    )
    run.run()
    for W, layer, found in zip(before, run.layers, factors.layers, strict=True):
        new = layer.read(torch.float64)
        kept = (new != 0).flatten().nonzero().flatten()
        if W.numel() > 256 or not found.more or kept.numel() == W.numel():
            continue
        assert found.A_CC is not None
        assert found.G_RR is not None
        F = torch.kron(damped(found.G_RR, 1.0), damped(found.A_CC, 1.0)) + torch.kron(*found.more[0])
        expected = torch.zeros(W.numel(), dtype=torch.float64)
        expected[kept] = torch.linalg.solve(F[kept[:, None], kept], (F @ W.flatten())[kept])
        D, least = (new - W).flatten(), expected - W.flatten()
        assert float(D @ F @ D) <= 1.01 * float(least @ F @ least)


def test_rounds_use_one_curvature_and_meet_the_target(tiny: PreTrainedModel) -> None:
    """Rounds without new curvature: the second starts from the first's optimum, so predictions add up."""
    run = session(tiny, sparsity=0.3, shots=2, rounds=3)
    state = run.run()
    assert [round(record.target_sparsity, 2) for record in state.shots] == [0.15, 0.3]
    assert all(record.sparsity >= record.target_sparsity for record in state.shots)
    assert len(state.ledger.history) == 6
    assert state.shots[0].units > 0


def test_rounds_remove_what_one_round_would_have_regretted() -> None:
    """Costs looked at again after part has gone: the model's predicted increase is lower for the same target."""
    once, often = (
        session(tiny_llama(), structure="neurons", sparsity=0.4, shots=1, rounds=rounds) for rounds in (1, 8)
    )
    predicted = [run.run().shots[0].predicted_loss_increase for run in (once, often)]
    assert predicted[0] is not None
    assert predicted[1] is not None
    assert predicted[1] < predicted[0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"structure": "rows", "method": "wanda"}, "wanda prunes single weights"),
        ({"structure": "neurons", "method": "sparsegpt"}, "sparsegpt prunes single weights"),
        ({"method": "magnitude", "curvature": "kfac"}, "magnitude uses identity curvature, not kfac"),
        ({"method": "l-obd", "curvature": "kron"}, "l-obd uses activations curvature, not kron"),
        ({"method": "k-obd", "update": "joint"}, "k-obd updates nothing"),
        ({"structure": "weights", "method": "sparsegpt", "update": "none"}, "sparsegpt has an update of its own"),
        ({"structure": "rows", "update": "chunked"}, "--update chunked is for weights and N:M"),
        ({"kronecker_terms": 2}, "kfac curvature has one Kronecker term"),
        ({"curvature": "kron", "kronecker_terms": 3}, "one or two Kronecker terms"),
        ({"curvature": "kron", "kronecker_terms": 2, "structure": "heads"}, "heads need one Kronecker term"),
        ({"method": "l-obd", "fisher": "mc"}, "needs no gradients"),
        ({"structure": "2:4", "sparsity": 0.6}, "2:4 removes at most 0.5"),
        ({"structure": "2:4", "method": "wanda", "shots": 2}, "prunes every group of 2:4 at once"),
        ({"structure": "weights", "rank_by": "cost"}, "all units of weights are of one size"),
        ({"structure": "4:2"}, "4:2 is no pattern"),
        ({"structure": "weights", "method": "wanda", "rounds": 5}, "rounds has no effect"),
        ({"shots": 1, "correction_epochs": 1.0}, "correction-epochs has no effect"),
        ({"fisher_samples": 4}, "fisher-samples has no effect"),
        ({"chunk": 5}, "chunk has no effect"),
        ({"lora_rank": 4}, "lora-rank has no effect"),
        ({"correction_epochs": 1.0, "heal_epochs": 2.0}, "heal-epochs has no effect"),
        ({"method": "magnitude", "damping_g": 0.5}, "damping-g has no effect"),
        ({"method": "k-obd", "damping_a": 0.5}, "damping-a has no effect"),
        ({"structure": "rows,heads"}, "unknown structure"),
    ],
)
def test_what_has_no_meaning_together_is_one_line(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        PruneConfig(**settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"structure": "heads", "sparsity": 0.6}, r"heads can remove [0-9,]+ at most: ask for a sparsity of 0\."),
        ({"structure": "2:4", "target_parameters": 3500}, "2:4 can remove"),
    ],
)
def test_more_than_a_structure_holds_is_refused_before_anything_runs(settings: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        session(tiny_llama(), **settings)
