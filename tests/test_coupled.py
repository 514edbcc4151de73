"""Neurons and heads in the shot loop: against brute force over units and the dense optimum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from surgeon.curvature import kfac
from surgeon.models import unit_groups
from surgeon.schedule import Ledger
from tests.conftest import VOCABULARY, tiny_llama
from tests.oracles.dense import damped, kkt_optimum, quadratic
from tests.test_session import session, windows

STRUCTURES = ["neurons", "heads", "neurons,heads"]
KINDS = {
    "neurons": frozenset({"neuron"}),
    "heads": frozenset({"head"}),
    "neurons,heads": frozenset({"neuron", "head"}),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["surgeon", "k-obd", "l-obd", "magnitude"])
def test_targets_are_met_by_whole_units(tiny: PreTrainedModel, structure: str, method: str) -> None:
    # Heads alone are about a third of the parameters.
    run = session(tiny, structure=structure, method=method, sparsity=0.2, shots=2)
    dense = [layer.read(torch.float64) for layer in run.layers]
    state = run.run()
    assert isinstance(state.ledger, Ledger)
    groups = unit_groups(run._matched, run.model.config, KINDS[structure])
    largest = max(group.unit_size(run.layers) + group.shared_size(run.layers) for group in groups)
    for record in state.shots:
        assert 0 <= record.sparsity - record.target_sparsity < largest / state.ledger.total
    rows = [torch.from_numpy(state.ledger.keep_rows(i)) for i in range(len(run.layers))]
    columns = [torch.from_numpy(state.ledger.keep_columns(i)) for i in range(len(run.layers))]
    removed = 0
    for group in groups:
        gone = ~columns[group.output][group.columns]
        assert (gone.all(1) == gone.any(1)).all()
        gone_units = gone.all(1)
        for part in group.own:
            assert torch.equal(~rows[part.layer][part.index].any(1), gone_units)
        for part in group.shared:
            assert bool((~rows[part.layer][part.index]).all()) == bool(gone_units.all())
        removed += int(gone_units.sum()) * group.unit_size(run.layers)
        removed += group.shared_size(run.layers) if bool(gone_units.all()) else 0
    assert removed == state.ledger.removed
    for index, layer in enumerate(run.layers):
        W = layer.read(torch.float64)
        assert (W[~rows[index]] == 0).all()
        assert (W[:, ~columns[index]] == 0).all()
        # What is no part of a removed unit is there, untouched but for the update of output layers.
        if not any(group.output == index for group in groups):
            assert torch.equal(W[rows[index]], dense[index][rows[index]])


def test_only_what_nobody_reads_goes_besides_the_columns(tiny: PreTrainedModel) -> None:
    """Undoing the rows that went for nothing leaves the model's function as it is."""
    run = session(tiny, structure="neurons,heads", sparsity=0.3, shots=1)
    dense = [layer.read(torch.float64) for layer in run.layers]
    run.run()
    ids = windows(2).ids
    with torch.no_grad():
        pruned = run.model(ids).logits
        outputs = {group.output for group in unit_groups(run._matched, run.model.config, KINDS["neurons,heads"])}
        for index, layer in enumerate(run.layers):
            if index not in outputs:
                layer.write(dense[index])
        torch.testing.assert_close(run.model(ids).logits, pruned, rtol=1e-10, atol=1e-10)


def test_one_shot_reaches_the_dense_optimum() -> None:
    run = session(tiny_llama(), structure="neurons,heads", shots=1, sparsity=0.3)
    before = [layer.read(torch.float64) for layer in run.layers]
    factors = kfac(run.model, run.layers, windows(), batch_tokens=64, accumulate=torch.float64, advance=lambda _n: None)
    state = run.run()
    outputs = {group.output for group in unit_groups(run._matched, run.model.config, KINDS["neurons,heads"])}
    assert isinstance(state.ledger, Ledger)
    changed = 0
    for index in outputs:
        keep = torch.from_numpy(state.ledger.keep_columns(index)).expand(before[index].shape)
        A, G = factors.layers[index].A_CC, factors.layers[index].G_RR
        assert A is not None
        assert G is not None
        expected = kkt_optimum(before[index], keep, damped(G, 0.1), damped(A, 0.01))
        torch.testing.assert_close(run.layers[index].read(torch.float64), expected, rtol=1e-8, atol=1e-9)
        changed += int((~keep).any())
    assert changed


def test_selection_is_the_cheapest_units_by_cost_per_parameter() -> None:
    """All units' set costs by dense solves, sorted, removed one after the other."""
    run = session(tiny_llama(), structure="neurons,heads", shots=1, sparsity=0.35)
    layers = run.layers
    factors = kfac(run.model, layers, windows(), batch_tokens=64, accumulate=torch.float64, advance=lambda _n: None)
    groups = unit_groups(run._matched, run.model.config, KINDS["neurons,heads"])
    units = []
    for number, group in enumerate(groups):
        W = layers[group.output].read(torch.float64)
        found = factors.layers[group.output]
        assert found.A_CC is not None
        assert found.G_RR is not None
        A = damped(found.A_CC, 0.01)
        for unit, columns in enumerate(group.columns):
            inverse = torch.linalg.inv(A)[columns[:, None], columns]
            energy = (W.T @ found.G_RR @ W)[columns[:, None], columns]
            cost = 0.5 * float(torch.trace(torch.linalg.inv(inverse) @ energy))
            units.append((cost / group.unit_size(layers), number, unit))
    target = int(np.ceil(0.35 * sum(layer.parameters for layer in layers)))
    removed, gone = 0, set()
    for _, number, unit in sorted(units):
        if removed >= target:
            break
        gone.add((number, unit))
        removed += groups[number].unit_size(layers)
        if all((number, other) in gone for other in range(groups[number].units)):
            removed += groups[number].shared_size(layers)
    state = run.run()
    assert isinstance(state.ledger, Ledger)
    for (number, group), unit in itertools.product(enumerate(groups), range(24)):
        if unit < group.units:
            kept = state.ledger.keep_columns(group.output)[group.columns[unit].numpy()].all()
            assert kept == ((number, unit) not in gone)
    assert state.ledger.removed == removed


def test_set_cost_of_a_head_is_the_optimum_by_brute_force() -> None:
    """What selection ranks by is what removing the head costs under the damped model, next to nothing else."""
    run = session(tiny_llama(), structure="heads", shots=1, sparsity=0.01)
    factors = kfac(run.model, run.layers, windows(), batch_tokens=64, accumulate=torch.float64, advance=lambda _n: None)
    groups = unit_groups(run._matched, run.model.config, KINDS["heads"])
    found = {}
    for group in groups:
        W = run.layers[group.output].read(torch.float64)
        one = factors.layers[group.output]
        assert one.A_CC is not None
        assert one.G_RR is not None
        A = damped(one.A_CC, 0.01)
        for columns in group.columns:
            keep = torch.ones_like(W, dtype=torch.bool)
            keep[:, columns] = False
            change = kkt_optimum(W, keep, one.G_RR + 1e-12 * torch.eye(len(W), dtype=W.dtype), A) - W
            found[group.block, int(columns[0])] = quadratic(change, one.G_RR, A)
    state = run.run()
    assert isinstance(state.ledger, Ledger)
    cheapest = min(found, key=lambda key: found[key])
    index = next(group.output for group in groups if group.block == cheapest[0])
    assert not state.ledger.keep_columns(index)[cheapest[1]]
    assert state.shots[0].units == 1


def test_dead_units_are_counted_and_cleared() -> None:
    """A zero gate row means a dead neuron; zero value rows mean dead heads, all of their group."""
    model = tiny_llama()
    run = session(model, structure="neurons,heads", shots=1, sparsity=0.001)
    role = {(layer.block, layer.role): layer for layer in run.layers}
    with torch.no_grad():
        role[0, "gate"].module.weight[5] = 0
        role[1, "v"].module.weight[4:8] = 0  # second of two groups, two query heads of width four
    state = run.run()
    assert (role[0, "up"].weight[5] == 0).all()
    assert (role[0, "down"].weight[:, 5] == 0).all()
    assert (role[1, "o"].weight[:, 8:] == 0).all()
    assert (role[1, "q"].weight[8:] == 0).all()
    assert (role[1, "k"].weight[4:] == 0).all()
    assert state.shots[0].units == 0
    assert state.ledger.removed == 3 * 16 + (8 + 8 + 4 + 4) * 16


def test_everything_but_little_can_go(tiny: PreTrainedModel) -> None:
    state = session(tiny, structure="neurons,heads", sparsity=0.95, shots=3).run()
    assert state.ledger.sparsity >= 0.95


def test_wide_groups_share_their_key_and_value() -> None:
    """Four query heads a group: the key and value rows go with the last of them and not before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    run = session(LlamaForCausalLM(config).eval(), structure="heads", sparsity=0.45, shots=3)
    state = run.run()
    assert isinstance(state.ledger, Ledger)
    whole = 0
    for group in unit_groups(run._matched, run.model.config, KINDS["heads"]):
        gone = ~torch.from_numpy(state.ledger.keep_columns(group.output))[group.columns].any(1)
        for part in group.shared:
            kept = torch.from_numpy(state.ledger.keep_rows(part.layer))[part.index.flatten()]
            assert bool(kept.any()) != bool(gone.all())
        whole += int(gone.all())
    assert 0 < whole < 4
