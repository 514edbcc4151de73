"""Joint updates and costs against dense float64 truths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon import costs, update
from surgeon.linalg import damped_cholesky, inverse_diagonal
from tests.conftest import spd
from tests.oracles.dense import damped, kkt_optimum, quadratic

LAMBDA_G, LAMBDA_A = 0.1, 0.01


class Case:
    def __init__(self, seed: int, R: int = 6, C: int = 7, *, rank: int | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        self.W = torch.randn(R, C, generator=g, dtype=torch.float64)
        self.G, self.A = spd(R, g, rank=rank), spd(C, g, rank=rank)
        self.Gd, self.Ad = damped(self.G, LAMBDA_G), damped(self.A, LAMBDA_A)
        self.LG = damped_cholesky(self.G, LAMBDA_G, what="G").L_nn
        self.LA = damped_cholesky(self.A, LAMBDA_A, what="A").L_nn


def subset(n: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, n - 1), unique=True, max_size=n).map(sorted)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=subset(6), columns=subset(7), low_rank=st.booleans())
def test_rows_and_columns_reach_the_kkt_optimum(seed: int, rows: list[int], columns: list[int], low_rank: bool) -> None:
    case = Case(seed, rank=3 if low_rank else None)
    keep = torch.ones(6, 7, dtype=torch.bool)
    keep[rows] = False
    keep[:, columns] = False
    first = update.remove_rows(case.W, case.LG, case.Ad, torch.tensor(rows, dtype=torch.long))
    second = update.remove_columns(first.W_RC, case.LA, case.Gd, torch.tensor(columns, dtype=torch.long))
    new = second.W_RC
    expected = kkt_optimum(case.W, keep, case.Gd, case.Ad)
    torch.testing.assert_close(new, expected, rtol=1e-8, atol=1e-8)
    assert (new[~keep] == 0).all()
    # In the damped metric the two set costs are together exactly what the model grows by.
    increase = quadratic(expected - case.W, case.Gd, case.Ad)
    assert float(first.cost + second.cost) == pytest.approx(increase, rel=1e-8, abs=1e-10)


def test_adding_separate_updates_is_not_the_optimum() -> None:
    """What the two-sided form is for: the sum of both updates of the old W is worse."""
    case = Case(3)
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 2, 6])
    by_rows = update.remove_rows(case.W, case.LG, case.Ad, rows).W_RC
    joint = update.remove_columns(by_rows, case.LA, case.Gd, columns).W_RC
    summed = by_rows + update.remove_columns(case.W, case.LA, case.Gd, columns).W_RC - case.W
    summed[rows] = 0
    summed[:, columns] = 0
    assert quadratic(joint - case.W, case.Gd, case.Ad) < 0.99 * quadratic(summed - case.W, case.Gd, case.Ad)


@pytest.mark.parametrize("seed", range(5))
def test_costs_are_the_loss_increase_of_the_optimum(seed: int) -> None:
    """A unit's OBS cost is the quadratic model's increase at the optimum without that unit."""
    case = Case(seed)
    g, a = inverse_diagonal(case.LG), inverse_diagonal(case.LA)
    row = costs.row_costs_obs(case.W, case.Ad, g)
    column = costs.column_costs_obs(case.W, case.Gd, a)
    element = costs.element_costs_obs(case.W, g, a)
    for r in range(6):
        keep = torch.ones(6, 7, dtype=torch.bool)
        keep[r] = False
        change = kkt_optimum(case.W, keep, case.Gd, case.Ad) - case.W
        assert float(row[r]) == pytest.approx(quadratic(change, case.Gd, case.Ad), rel=1e-8)
    for c in range(7):
        keep = torch.ones(6, 7, dtype=torch.bool)
        keep[:, c] = False
        change = kkt_optimum(case.W, keep, case.Gd, case.Ad) - case.W
        assert float(column[c]) == pytest.approx(quadratic(change, case.Gd, case.Ad), rel=1e-8)
    keep = torch.ones(6, 7, dtype=torch.bool)
    keep[2, 3] = False
    change = kkt_optimum(case.W, keep, case.Gd, case.Ad) - case.W
    assert float(element[2, 3]) == pytest.approx(quadratic(change, case.Gd, case.Ad), rel=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_obd_costs_are_the_increase_of_zeroing(seed: int) -> None:
    case = Case(seed)
    row = costs.row_costs_obd(case.W, case.A, case.G)
    column = costs.column_costs_obd(case.W, case.A, case.G)
    element = costs.element_costs_obd(case.W, case.A, case.G)
    for r in range(6):
        D = torch.zeros_like(case.W)
        D[r] = -case.W[r]
        assert float(row[r]) == pytest.approx(quadratic(D, case.G, case.A), rel=1e-10)
    for c in range(7):
        D = torch.zeros_like(case.W)
        D[:, c] = -case.W[:, c]
        assert float(column[c]) == pytest.approx(quadratic(D, case.G, case.A), rel=1e-10)
    D = torch.zeros_like(case.W)
    D[2, 3] = -case.W[2, 3]
    assert float(element[2, 3]) == pytest.approx(quadratic(D, case.G, case.A), rel=1e-10)


def test_identity_factors_mean_magnitude() -> None:
    W = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(costs.row_costs_obd(W, None, None), 0.5 * W.square().sum(1))
    torch.testing.assert_close(costs.column_costs_obd(W, None, None), 0.5 * W.square().sum(0))
    torch.testing.assert_close(costs.element_costs_obd(W, None, None), 0.5 * W.square())
    eye = torch.eye(4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(costs.quadratic_increase(W, None, None), costs.quadratic_increase(W, *eye))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fraction=st.floats(0.0, 1.0))
def test_elements_reach_the_kkt_optimum(seed: int, fraction: float) -> None:
    case = Case(seed)
    g = torch.Generator().manual_seed(seed + 1)
    keep = torch.rand(6, 7, generator=g) >= fraction
    result = update.remove_elements(case.W, keep, [(case.Gd, case.Ad)], steps=500, tolerance=0.0)
    torch.testing.assert_close(result.W_RC, kkt_optimum(case.W, keep, case.Gd, case.Ad), rtol=1e-8, atol=1e-8)
    assert (result.W_RC[~keep] == 0).all()
    increase = quadratic(result.W_RC - case.W, case.Gd, case.Ad)
    assert result.increases[-1] == pytest.approx(increase, rel=1e-6, abs=1e-9)
    assert all(
        later <= earlier * (1 + 1e-9) for earlier, later in zip(result.increases, result.increases[1:], strict=False)
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fraction=st.floats(0.1, 0.9))
def test_elements_under_a_sum_of_kronecker_products(seed: int, fraction: float) -> None:
    """Two terms: the optimum of the dense quadratic model, by a solve on the kept weights alone."""
    case, other = Case(seed), Case(seed + 1)
    g = torch.Generator().manual_seed(seed + 2)
    keep = torch.rand(6, 7, generator=g) >= fraction
    found = update.remove_elements(
        case.W, keep, [(case.Gd, case.Ad), (other.G, other.A)], steps=500, tolerance=0.0
    ).W_RC
    F = torch.kron(case.Gd, case.Ad) + torch.kron(other.G, other.A)
    kept = keep.flatten().nonzero().flatten()
    expected = torch.zeros(42, dtype=torch.float64)
    if kept.numel():
        expected[kept] = torch.linalg.solve(F[kept[:, None], kept], (F @ case.W.flatten())[kept])
    torch.testing.assert_close(found, expected.reshape(6, 7), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("factor", ["G", "A"])
def test_elements_with_one_identity_factor(factor: str) -> None:
    """Activations only is G = I, and the other way round."""
    case = Case(4)
    keep = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    G = torch.eye(6, dtype=torch.float64) if factor == "G" else case.Gd
    A = torch.eye(7, dtype=torch.float64) if factor == "A" else case.Ad
    terms = [(None, case.Ad) if factor == "G" else (case.Gd, None)]
    found = update.remove_elements(case.W, keep, terms, steps=500, tolerance=0.0)
    expected = kkt_optimum(case.W, keep, G, A)
    torch.testing.assert_close(found.W_RC, expected, rtol=1e-8, atol=1e-8)


def test_chunked_is_exact_in_one_chunk_and_worse_in_many() -> None:
    case = Case(7)
    keep = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    whole = update.remove_elements_chunked(case.W, keep, case.LG, case.LA, chunk=42)
    optimum = kkt_optimum(case.W, keep, case.Gd, case.Ad)
    torch.testing.assert_close(whole, optimum, rtol=1e-8, atol=1e-8)
    parts = update.remove_elements_chunked(case.W, keep, case.LG, case.LA, chunk=4)
    assert (parts[~keep] == 0).all()
    losses = [quadratic(new - case.W, case.Gd, case.Ad) for new in (parts, optimum)]
    assert losses[0] > 1.05 * losses[1]
    # Chunks of one weight: each removed alone, the changes added up.
    alone = case.W.clone()
    for r, c in (~keep).nonzero():
        single = torch.ones_like(keep)
        single[r, c] = False
        alone += kkt_optimum(case.W, single, case.Gd, case.Ad) - case.W
    ones = update.remove_elements_chunked(case.W, keep, case.LG, case.LA, chunk=1)
    torch.testing.assert_close(ones, alone * keep, rtol=1e-8, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), columns=subset(7))
def test_set_costs_are_the_loss_increase_of_the_optimum(seed: int, columns: list[int]) -> None:
    case = Case(seed)
    sets = [torch.tensor(columns, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([], dtype=torch.long)]
    inverse = torch.cholesky_inverse(case.LA)
    found = costs.column_set_costs_obs(case.W, case.Gd, inverse, sets)
    plain = costs.column_set_costs_obd(case.W, case.Ad, case.Gd, sets)
    for number, chosen in enumerate(sets):
        keep = torch.ones(6, 7, dtype=torch.bool)
        keep[:, chosen] = False
        change = kkt_optimum(case.W, keep, case.Gd, case.Ad) - case.W
        assert float(found[number]) == pytest.approx(quadratic(change, case.Gd, case.Ad), rel=1e-8, abs=1e-10)
        zeroed = case.W * keep - case.W
        assert float(plain[number]) == pytest.approx(quadratic(zeroed, case.Gd, case.Ad), rel=1e-8, abs=1e-10)
