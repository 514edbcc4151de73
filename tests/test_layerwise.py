"""Wanda and SparseGPT against plain loops; the sequential pass against the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from surgeon.data import Windows
from surgeon.errors import ModelError, NonFiniteError, SelectionError, SingularFactorError, ZeroCurvatureError
from surgeon.layers import PrunableLayer
from surgeon.layerwise import (
    eliminate,
    input_norms,
    inverse_factor,
    prune_blocks,
    sparsegpt,
    wanda_costs,
    wanda_mask,
    wanda_nm_mask,
)
from surgeon.layerwise.ranking import removed_count
from surgeon.models import match_layers
from surgeon.select import nm_keep
from tests.conftest import VOCABULARY, spd
from tests.oracles import dense
from tests.oracles import layerwise as oracle

FRACTIONS = st.sampled_from(["0", "0.1", "0.25", "0.3", "0.5", "0.7", "0.95", "0.999"])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# --- How many and which ---------------------------------------------------------------------------


@given(st.integers(0, 5000) | st.integers(0, 10**9), st.integers(0, 9999))
def test_counts_are_exact(total: int, digits: int) -> None:
    assert removed_count(total, digits / 10_000) == oracle.count(total, f"{digits}/10000")


@given(st.integers(1, 3000), st.data())
def test_counts_read_a_float_as_the_ratio_it_came_from(total: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, total - 1))
    assert removed_count(total, part / total) == part
    assert removed_count(10, 0.1 + 0.2) == 3


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float) -> None:
    with pytest.raises(SelectionError, match=r"\[0, 1\)"):
        removed_count(10, fraction)


def test_nm_keep_maps_errors_and_keeps_the_dtype_it_can_compare() -> None:
    costs = normal(3, 10)
    expected = torch.cat([oracle.group_mask(costs[:, at : at + 4], 2) for at in (0, 4, 8)], dim=1)
    for given_costs in (costs, costs.float(), costs.T.contiguous().T, costs.clone().requires_grad_()):
        assert torch.equal(nm_keep(given_costs, 2, 4), expected)
    # Two costs that only float64 tells apart; equal ones lose the lower index.
    assert nm_keep(torch.tensor([[1.0 + 1e-12, 1.0]], dtype=torch.float64), 1, 2).tolist() == [[True, False]]
    assert nm_keep(torch.tensor([[1.0 + 1e-12, 1.0]]), 1, 2).tolist() == [[False, True]]
    costs[1, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"cost of element 13 of layer here is [nN]a[nN]") as caught:
        nm_keep(costs, 2, 4, layer="here")
    assert (caught.value.layer, caught.value.index) == ("here", 13)


# --- Wanda ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", ["0.3", "0.5", "0.9"])
def test_wanda_equals_plain_loops(fraction: str) -> None:
    W, X = normal(5, 13), normal(40, 13, seed=1) * torch.linspace(0.1, 3.0, 13, dtype=torch.float64)
    norms = input_norms(X.T @ X / 40)
    keep = wanda_mask(W, norms, float(fraction))
    assert torch.equal(keep, oracle.wanda(W, X, fraction))
    assert torch.equal(keep, wanda_mask(W, 1e3 * norms, float(fraction)))
    assert not torch.equal(keep, wanda_mask(W, torch.ones_like(norms), float(fraction)))


@given(st.integers(1, 6), st.integers(1, 20), FRACTIONS, st.integers(0, 2**31))
def test_wanda_counts_and_ties(rows: int, columns: int, fraction: str, seed: int) -> None:
    W = torch.randint(-2, 3, (rows, columns), generator=seeded(seed)).double()
    norms = torch.randint(0, 3, (columns,), generator=seeded(seed + 1)).double()
    keep = wanda_mask(W, norms, float(fraction))
    removed = oracle.count(columns, fraction)
    assert (~keep).sum(1).tolist() == [removed] * rows
    for r in range(rows):
        gone = oracle.cheapest((W[r].abs() * norms).tolist(), removed)
        assert set((~keep[r]).nonzero().flatten().tolist()) == gone


def test_wanda_takes_old_zeros_first() -> None:
    W, norms = normal(6, 16), normal(16, seed=1).abs()
    first = W * wanda_mask(W, norms, 0.25)
    second = first * wanda_mask(first, norms, 0.5)
    assert ((second != 0).sum(1) == 8).all()
    assert not (second[first == 0] != 0).any()


@pytest.mark.parametrize(("keep", "group", "columns"), [(2, 4, 12), (2, 4, 15), (4, 8, 21), (1, 3, 7)])
def test_wanda_patterns_equal_a_sort_of_each_group(keep: int, group: int, columns: int) -> None:
    W, norms = normal(5, columns), normal(columns, seed=1).abs()
    costs = wanda_costs(W, norms)
    expected = torch.cat([oracle.group_mask(part, keep) for part in costs.split(group, dim=1)], dim=1)
    assert torch.equal(wanda_nm_mask(W, norms, keep, group), expected)


def test_wanda_refuses_what_is_not_finite() -> None:
    W, norms = normal(2, 4), torch.ones(4, dtype=torch.float64)
    W[1, 2] = float("inf")
    with pytest.raises(NonFiniteError, match="element 6 of layer up"):
        wanda_mask(W, norms, 0.5, layer="up")
    with pytest.raises(NonFiniteError, match="element 6 of layer up"):
        wanda_nm_mask(W, norms, 2, 4, layer="up")


# --- SparseGPT ------------------------------------------------------------------------------------


def problem(rows: int, columns: int, *, seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Weights and a moment of strongly correlated inputs."""
    mix = normal(columns, columns, seed=seed) + 2.0
    return normal(rows, columns, seed=seed + 1), mix @ spd(columns, seeded(seed + 2), rank=rank) @ mix.T


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, A = problem(1, 9)
    found = inverse_factor(A, 0.02)
    expected = torch.linalg.cholesky(torch.linalg.inv(dense.damped(A, 0.02)), upper=True)
    torch.testing.assert_close(found.U_CC, expected, rtol=1e-9, atol=1e-12)
    assert (found.asked, found.relative, found.ladder_step) == (0.02, 0.02, 0)
    assert not found.dead.any()


@pytest.mark.parametrize(("columns", "block"), [(12, 12), (12, 4), (13, 5), (9, 128), (7, 1)])
@pytest.mark.parametrize("fraction", ["0.25", "0.5", "0.7"])
def test_sparsegpt_equals_column_by_column_elimination(columns: int, block: int, fraction: str) -> None:
    W, A = problem(6, columns, seed=columns)
    H = dense.damped(A, 0.01)
    new = sparsegpt(W, A, fraction=float(fraction), pattern=None, block=block)
    keep = new != 0
    torch.testing.assert_close(new, oracle.eliminate(W, H, keep), rtol=1e-9, atol=1e-11)
    for start in range(0, columns, block):
        now = oracle.eliminate(W, H, keep, until=start)
        costs = oracle.removal_costs(now, H, W == 0)[:, start : start + block]
        assert torch.equal(keep[:, start : start + block], oracle.block_mask(costs, fraction))


@pytest.mark.parametrize(
    ("pattern", "columns", "block"),
    [((2, 4), 12, 8), ((2, 4), 12, 6), ((2, 4), 15, 128), ((4, 8), 24, 8), ((4, 8), 21, 4), ((1, 3), 11, 5)],
)
def test_sparsegpt_patterns_equal_column_by_column_elimination(
    pattern: tuple[int, int], columns: int, block: int
) -> None:
    W, A = problem(5, columns, seed=columns)
    H = dense.damped(A, 0.05)
    new = sparsegpt(W, A, fraction=None, pattern=pattern, damping=0.05, block=block)
    keep = new != 0
    torch.testing.assert_close(new, oracle.eliminate(W, H, keep), rtol=1e-9, atol=1e-11)
    for start in range(0, columns, pattern[1]):
        members = slice(start, start + pattern[1])
        now = oracle.eliminate(W, H, keep, until=start)
        costs = oracle.removal_costs(now, H, W == 0)[:, members]
        assert torch.equal(keep[:, members], oracle.group_mask(costs, pattern[0]))
        assert (keep[:, members].sum(1) == min(pattern[0], costs.shape[1])).all()


def test_sparsegpt_is_optimal_where_all_that_goes_stands_before_all_that_stays() -> None:
    """With nothing fixed in front of it elimination is exact: the dense solution of the KKT system."""
    W, A = problem(3, 8)
    W[:, :3] *= 1e-6
    new = sparsegpt(W, A, fraction=3 / 8, pattern=None)
    keep = torch.ones(3, 8, dtype=torch.bool)
    keep[:, :3] = False
    assert torch.equal(new != 0, keep)
    H = dense.damped(A, 0.01)
    torch.testing.assert_close(new, dense.kkt_optimum(W, keep, torch.eye(3).double(), H), rtol=1e-8, atol=1e-12)


def test_sparsegpt_lies_between_the_optimum_and_the_mask_alone() -> None:
    W, A = problem(4, 16)
    H, identity = dense.damped(A, 0.01), torch.eye(4, dtype=torch.float64)
    new = sparsegpt(W, A, fraction=0.5, pattern=None)
    keep = new != 0
    found = dense.quadratic(new - W, identity, H)
    best = dense.quadratic(dense.kkt_optimum(W, keep, identity, H) - W, identity, H)
    masked = dense.quadratic(W * ~keep, identity, H)
    wanda = dense.quadratic(W * ~wanda_mask(W, input_norms(A), 0.5), identity, H)
    assert best < found < 0.5 * min(masked, wanda)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 25), FRACTIONS, st.integers(0, 2**31))
def test_sparsegpt_counts(rows: int, columns: int, block: int, fraction: str, seed: int) -> None:
    W, A = problem(rows, columns, seed=seed)
    new = sparsegpt(W, A, fraction=float(fraction), pattern=None, block=block)
    for part in new.split(block, dim=1):
        assert int((part == 0).sum()) == oracle.count(part.numel(), fraction)
    torch.testing.assert_close(
        new, sparsegpt(W, 7.0 * A, fraction=float(fraction), pattern=None, block=block), rtol=1e-6, atol=1e-9
    )


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(2, 9), st.integers(1, 12), st.data())
def test_sparsegpt_pattern_counts(rows: int, columns: int, group: int, block: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, group - 1))
    W, A = problem(rows, columns, seed=data.draw(st.integers(0, 2**31)))
    new = sparsegpt(W, A, fraction=None, pattern=(keep, group), block=block)
    for part in new.split(group, dim=1):
        assert ((part != 0).sum(1) == min(keep, part.shape[1])).all()
    whole = sparsegpt(W, A, fraction=None, pattern=(keep, group), block=10**6)
    torch.testing.assert_close(new, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_sparsegpt_keeps_old_zeros_and_counts_them(pattern: tuple[int, int] | None) -> None:
    W, A = problem(8, 16)
    first = sparsegpt(W, A, fraction=0.25, pattern=None, block=8)
    fraction = 0.5 if pattern is None else None
    second = sparsegpt(first, A, fraction=fraction, pattern=pattern, block=8)
    assert not (second[first == 0] != 0).any()
    keep, H = second != 0, dense.damped(A, 0.01)
    torch.testing.assert_close(second, oracle.eliminate(first, H, keep), rtol=1e-9, atol=1e-11)
    if pattern is None:
        assert [int((part == 0).sum()) for part in second.split(8, dim=1)] == [32, 32]
        now = oracle.removal_costs(first, H, first == 0)[:, :8]
        assert torch.equal(keep[:, :8], oracle.block_mask(now, "0.5"))
    else:
        standing = (first != 0).unflatten(1, (4, 4)).sum(2)
        assert torch.equal(keep.unflatten(1, (4, 4)).sum(2), standing.clamp(max=pattern[0]))
    # Less than what is gone already: nothing more goes, and nothing comes back.
    assert torch.equal(sparsegpt(first, A, fraction=0.1, pattern=None), first)


def test_old_zeros_stay_where_there_are_more_than_are_asked_for() -> None:
    """Errors from a block that loses weights must not fill a later one that has lost more already."""
    W, A = problem(8, 16)
    W[:, 8:] *= torch.rand(8, 8, generator=seeded(9)) > 0.75
    new = sparsegpt(W, A, fraction=0.5, pattern=None, block=8)
    assert int((new[:, :8] == 0).sum()) == 32 < int((W[:, 8:] == 0).sum())
    assert torch.equal(new[:, 8:] == 0, W[:, 8:] == 0)
    torch.testing.assert_close(new, oracle.eliminate(W, dense.damped(A, 0.01), new != 0), rtol=1e-9, atol=1e-11)


def test_dead_inputs_go_first_and_touch_nothing_else() -> None:
    W, A = problem(4, 10)
    dead = [2, 7]
    A[dead] = 0.0
    A[:, dead] = 0.0
    live = [c for c in range(10) if c not in dead]
    new = sparsegpt(W, A, fraction=0.5, pattern=None)
    assert (new[:, dead] == 0).all()
    assert int((new == 0).sum()) == 20
    # 12 of the 32 live weights are what is left to go; the damping is that of the live inputs.
    torch.testing.assert_close(new[:, live], sparsegpt(W[:, live], A[live][:, live], fraction=12 / 32, pattern=None))
    assert inverse_factor(A).dead.nonzero().flatten().tolist() == dead
    assert (sparsegpt(W, torch.zeros_like(A), fraction=0.5, pattern=None) == 0).all()


def test_few_samples_climb_the_damping_ladder_or_are_refused() -> None:
    W, A = problem(3, 12, rank=4)
    found = inverse_factor(A, 0.0)
    assert found.ladder_step > 0
    assert found.relative > 0.0 == found.asked
    assert ((eliminate(W, found, fraction=None, pattern=(2, 4)) != 0).unflatten(1, (3, 4)).sum(2) == 2).all()
    with pytest.raises(SingularFactorError, match="layer down"):
        sparsegpt(W, A - 100.0 * torch.eye(12), fraction=0.5, pattern=None, layer="down")


def test_float32_agrees_with_float64() -> None:
    W, A = problem(6, 24)
    for options in ({"fraction": 0.5, "pattern": None}, {"fraction": None, "pattern": (2, 4)}):
        found = sparsegpt(W.float(), A.float(), **options)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        expected = sparsegpt(W, A, **options)  # type: ignore[arg-type]
        assert torch.equal(found != 0, expected != 0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_sparsegpt_does_not_change_what_it_is_given() -> None:
    W, A = problem(4, 8)
    W_before, A_before = W.clone(), A.clone()
    sparsegpt(W, A, fraction=0.5, pattern=None)
    assert torch.equal(W, W_before)
    assert torch.equal(A, A_before)


def test_sparsegpt_refuses_what_makes_no_sense() -> None:
    W, A = problem(2, 8)
    with pytest.raises(SelectionError, match="either a fraction"):
        sparsegpt(W, A, fraction=None, pattern=None)
    with pytest.raises(SelectionError, match="either a fraction"):
        sparsegpt(W, A, fraction=0.5, pattern=(2, 4))
    for pattern in [(0, 4), (4, 4), (0, 0)]:
        with pytest.raises(SelectionError, match="cannot be kept"):
            sparsegpt(W, A, fraction=None, pattern=pattern)
    with pytest.raises(SelectionError, match="at least one column"):
        sparsegpt(W, A, fraction=0.5, pattern=None, block=0)
    A[5, 5] = float("nan")
    with pytest.raises(NonFiniteError, match="element 45 of the curvature factor A of layer q"):
        sparsegpt(W, A, fraction=0.5, pattern=None, layer="q")
    W[1, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="weight 11 of layer q is not finite") as caught:
        sparsegpt(W, problem(2, 8)[1], fraction=0.5, pattern=None, layer="q")
    assert (caught.value.layer, caught.value.index) == ("q", 11)


# --- Block by block -------------------------------------------------------------------------------


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    return model.double().requires_grad_(False)


def windows(n: int = 5, length: int = 12) -> Windows:
    return Windows(torch.randint(0, VOCABULARY, (n, length), generator=seeded(3)), "random")


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    found = model.get_submodule(match_layers(model).adapter.blocks)
    assert isinstance(found, nn.ModuleList)
    return list(found)


def identity(_index: int, W_RC: Tensor, _A_CC: Tensor) -> Tensor:
    return W_RC


def thin(index: int, W_RC: Tensor, _A_CC: Tensor) -> Tensor:
    """A change that depends on nothing but the layer, and is large."""
    return W_RC * (torch.arange(W_RC.numel()).reshape(W_RC.shape) % 3 != index % 3)


def run(
    model: PreTrainedModel,
    data: Windows,
    prune_layer: Callable[[int, Tensor, Tensor], Tensor],
    *,
    batch_tokens: int = 24,
    layers: tuple[PrunableLayer, ...] | None = None,
    blocks: list[nn.Module] | None = None,
) -> int:
    """Windows that were counted."""
    steps: list[int] = []
    prune_blocks(
        model,
        blocks_of(model) if blocks is None else blocks,
        match_layers(model).layers if layers is None else layers,
        data,
        batch_tokens=batch_tokens,
        prune_layer=prune_layer,
        advance=steps.append,
        accumulate=torch.float64,
    )
    return sum(steps)


def moments_of(
    model: PreTrainedModel, data: Windows, *, batch_tokens: int = 24, **options: object
) -> dict[int, Tensor]:
    """Each layer's A in a run that thins every layer out."""
    found: dict[int, Tensor] = {}

    def prune_layer(index: int, W_RC: Tensor, A_CC: Tensor) -> Tensor:
        found[index] = A_CC
        return thin(index, W_RC, A_CC)

    run(model, data, prune_layer, batch_tokens=batch_tokens, **options)  # type: ignore[arg-type]
    return found


def naive_moments(model: PreTrainedModel, layers: tuple[PrunableLayer, ...], alone: list[Tensor]) -> dict[int, Tensor]:
    """The same by the whole model, thinned out block by block. Changes the model."""
    expected: dict[int, Tensor] = {}
    for block in sorted({layer.block for layer in layers}):
        mine = {i: layer for i, layer in enumerate(layers) if layer.block == block}
        A = oracle.input_moments(model, {layer.name: layer.module for layer in mine.values()}, alone)
        for index, layer in mine.items():
            expected[index] = A[layer.name]
            weight = layer.module.weight
            assert isinstance(weight, Tensor)
            view = weight.T if layer.transposed else weight
            view.copy_(thin(index, view.clone(), A[layer.name]))
    return expected


def test_pruning_nothing_changes_nothing(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    before = copy.deepcopy(tiny.state_dict())
    data, blocks = windows(), blocks_of(tiny)
    states: dict[int, list[Tensor]] = {number: [] for number in range(len(blocks))}
    handles = [
        block.register_forward_hook(lambda _module, _args, out, kept=states[number]: kept.append(out))
        for number, block in enumerate(blocks)
    ]
    assert run(tiny, data, identity) == 2 * len(data)
    for handle in handles:
        handle.remove()
    after = tiny.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # Batches of 2, 2 and 1 windows. The last block runs once for its A, the one before twice, and once
    # for each of the two shapes while it is watched.
    assert [[len(out) for out in states[number]] for number in (0, 1)] == [[2, 1, 2, 2, 1, 2, 2, 1], [2, 2, 1]]
    expected = tiny(input_ids=data.ids, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(torch.cat(states[0][-3:]), expected[1], rtol=1e-10, atol=1e-12)
    decoder = tiny.get_decoder()
    norm = decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm
    torch.testing.assert_close(norm(torch.cat(states[1])), expected[-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 24, 36, 10_000])
def test_moments_are_those_of_the_model_pruned_so_far(tiny: PreTrainedModel, batch_tokens: int) -> None:
    naive = freeze(copy.deepcopy(tiny))
    freeze(tiny)
    data = windows()
    found = moments_of(tiny, data, batch_tokens=batch_tokens)
    layers = match_layers(naive).layers
    expected = naive_moments(naive, layers, list(data.ids))
    assert sorted(found) == sorted(expected) == list(range(len(layers)))
    for index, layer in enumerate(layers):
        assert found[index].shape == (layer.inputs, layer.inputs)
        torch.testing.assert_close(found[index], expected[index], rtol=1e-9, atol=1e-12, msg=layer.name)
    # The weights are what prune_layer gave, all else, the biases among it, is as it was.
    pairs = zip(tiny.state_dict().items(), naive.state_dict().values(), strict=True)
    assert all(torch.equal(value, other) for (_, value), other in pairs)


def test_padding_is_left_out(tiny: PreTrainedModel) -> None:
    """Masks that differ within and between batches of one shape."""
    naive = freeze(copy.deepcopy(tiny))
    freeze(tiny)
    ids = windows(5, 12).ids
    lengths = [7, 12, 12, 10, 4]
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    found = moments_of(tiny, Windows(ids, "padded", mask))
    layers = match_layers(naive).layers
    expected = naive_moments(naive, layers, [row[:length] for row, length in zip(ids, lengths, strict=True)])
    for index, layer in enumerate(layers):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-9, atol=1e-12, msg=layer.name)


def test_transposed_weights() -> None:
    """GPT-2 keeps its weights as [in, out]; whatever else its blocks are called with is replayed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    model = freeze(GPT2LMHeadModel(config).eval())
    naive = copy.deepcopy(model)

    def layers_of(model: PreTrainedModel) -> tuple[PrunableLayer, ...]:
        paths = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        names = [(block, path, f"transformer.h.{block}.{path}") for block in (0, 1) for path in paths]
        return tuple(PrunableLayer(n, path, b, model.get_submodule(n), transposed=True) for b, path, n in names)

    data = windows()
    blocks = [model.get_submodule(f"transformer.h.{block}") for block in (0, 1)]
    found = moments_of(model, data, layers=layers_of(model), blocks=blocks)
    expected = naive_moments(naive, layers_of(naive), list(data.ids))
    for index, A in expected.items():
        torch.testing.assert_close(found[index], A, rtol=1e-9, atol=1e-12)
    pairs = zip(model.state_dict().values(), naive.state_dict().values(), strict=True)
    assert all(torch.equal(value, other) for value, other in pairs)


def test_layers_that_read_the_same_tensor_get_the_same_moment(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    layers = match_layers(tiny).layers
    found = moments_of(tiny, windows())
    for block in (0, 1):
        by_role = {layer.role: found[i] for i, layer in enumerate(layers) if layer.block == block}
        assert by_role["q"] is by_role["k"] is by_role["v"] is not by_role["o"]
        assert ("gate" not in by_role) or (by_role["gate"] is by_role["up"] is not by_role["down"])


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_both_methods_over_a_whole_model(tiny: PreTrainedModel, pattern: tuple[int, int] | None) -> None:
    """SparseGPT does less damage than Wanda, and both leave what they promise."""
    freeze(tiny)
    layers = match_layers(tiny).layers
    data = windows(20, 16)
    dense_logits = tiny(input_ids=data.ids, use_cache=False).logits
    damage = {}

    def by_wanda(index: int, W_RC: Tensor, A_CC: Tensor) -> Tensor:
        norms = input_norms(A_CC)
        keep = wanda_mask(W_RC, norms, 0.5) if pattern is None else wanda_nm_mask(W_RC, norms, *pattern)
        return W_RC * keep

    def by_sparsegpt(index: int, W_RC: Tensor, A_CC: Tensor) -> Tensor:
        return sparsegpt(W_RC, A_CC, fraction=None if pattern else 0.5, pattern=pattern, layer=layers[index].name)

    start = copy.deepcopy(tiny.state_dict())
    for name, prune_layer in (("wanda", by_wanda), ("sparsegpt", by_sparsegpt)):
        tiny.load_state_dict(start)
        run(tiny, data, prune_layer)
        for layer in layers:
            kept = layer.weight != 0
            assert 2 * int(kept.sum()) == kept.numel()
            assert pattern is None or (kept.unflatten(1, (-1, 4)).sum(2) == 2).all()
        damage[name] = float((tiny(input_ids=data.ids, use_cache=False).logits - dense_logits).square().mean())
    assert 0.0 < damage["sparsegpt"] < damage["wanda"]


def hooks_on(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hooks_and_no_gradients_remain(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    run(tiny, windows(), thin)
    assert hooks_on(tiny) == 0
    assert all(p.grad is None and not p.requires_grad for p in tiny.parameters())

    def fails(_index: int, _W: Tensor, _A: Tensor) -> Tensor:
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        run(tiny, windows(), fails)
    with pytest.raises(IndexError):
        run(tiny, Windows(torch.full((1, 4), VOCABULARY + 5), "beyond the vocabulary"), thin)
    assert hooks_on(tiny) == 0


def test_non_finite_inputs_name_layer_and_window(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    victim = 95
    ids = torch.where(windows(5).ids == victim, 0, windows(5).ids)
    ids[3, 5] = victim
    tiny.get_input_embeddings().weight[victim] = float("nan")
    first = match_layers(tiny).layers[0].name
    with pytest.raises(NonFiniteError, match=f"input of layer {first} is not finite in calibration window 3") as caught:
        run(tiny, Windows(ids, "with a hole"), thin)
    assert (caught.value.layer, caught.value.index) == (first, 3)
    assert hooks_on(tiny) == 0


def test_padded_places_may_be_anything(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    victim = 95
    ids = torch.where(windows(3).ids == victim, 0, windows(3).ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[1, 9:], mask[1, 9:] = victim, False
    tiny.get_input_embeddings().weight[victim] = 1e4
    first = moments_of(copy.deepcopy(tiny), Windows(ids, "padded", mask))
    tiny.get_input_embeddings().weight[victim] = -3.0
    second = moments_of(tiny, Windows(ids, "padded", mask))
    assert all(torch.equal(first[index], second[index]) for index in first)


def test_non_finite_weights_name_the_layer(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    name = match_layers(tiny).layers[3].name
    with pytest.raises(NonFiniteError, match=f"layer {name} is not finite"):
        run(tiny, windows(), lambda index, W, _A: W / 0.0 if index == 3 else W)


def test_layers_and_blocks_that_are_not_reached(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    layers = match_layers(tiny).layers
    lost = PrunableLayer("lost", "q", 1, nn.Linear(16, 16).double())
    with pytest.raises(ZeroCurvatureError, match="layer lost was never reached"):
        run(tiny, windows(), identity, layers=(*layers, lost))
    blocks = blocks_of(tiny)
    with pytest.raises(ModelError, match=r"block 2 of \w+ was never reached"):
        run(tiny, windows(), identity, blocks=[*blocks, nn.Identity()])
    with pytest.raises(ModelError, match="in its turn"):
        run(tiny, windows(), identity, blocks=blocks[::-1])


def test_models_that_do_more_between_blocks_are_refused(tiny: PreTrainedModel) -> None:
    freeze(tiny)
    blocks = blocks_of(tiny)
    # What the second block is called with is no longer what the first one gave.
    handle = blocks[1].register_forward_pre_hook(lambda _module, args: (2.0 * args[0], *args[1:]))
    with pytest.raises(ModelError, match="between decoder blocks 0 and 1"):
        run(tiny, windows(), identity)
    handle.remove()
    assert hooks_on(tiny) == 0


def test_blocks_without_layers_are_passed_through(tiny: PreTrainedModel) -> None:
    naive = freeze(copy.deepcopy(tiny))
    freeze(tiny)
    data = windows()

    def second(model: PreTrainedModel) -> tuple[PrunableLayer, ...]:
        return tuple(layer for layer in match_layers(model).layers if layer.block == 1)

    found = moments_of(tiny, data, layers=second(tiny))
    expected = naive_moments(naive, second(naive), list(data.ids))
    for index, A in expected.items():
        torch.testing.assert_close(found[index], A, rtol=1e-9, atol=1e-12)
    assert run(tiny, data, identity, layers=second(tiny)) == 2 * len(data)
