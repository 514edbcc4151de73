"""Sums of Kronecker products against dense matrices and their plain inverses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from surgeon.errors import NonFiniteError, SingularFactorError
from surgeon.kronsum import TwoTerms, sum_product, two_terms
from tests.conftest import spd

SHAPES = [(3, 4), (5, 2), (1, 3), (4, 1)]
Pair = tuple[Tensor, Tensor]


def example(R: int, C: int, *, scale: float = 0.2) -> tuple[Pair, Pair]:
    """A positive definite term and an indefinite one that leaves the sum positive definite."""
    generator = torch.Generator().manual_seed(10 * R + C)

    def symmetric(n: int) -> Tensor:
        X = torch.randn(n, n, generator=generator, dtype=torch.float64)
        return X + X.T

    eye = torch.eye
    first = (spd(R, generator) + 0.5 * eye(R).double(), spd(C, generator) + 0.5 * eye(C).double())
    second = (scale * symmetric(R), scale * symmetric(C))
    return first, second


def dense(first: Pair, second: Pair) -> np.ndarray:
    F = torch.kron(*first) + torch.kron(*second)
    assert float(torch.linalg.eigvalsh(F)[0]) > 0.0
    return F.numpy()


def weights(R: int, C: int) -> Tensor:
    return torch.randn(R, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def solved(R: int, C: int) -> tuple[TwoTerms, np.ndarray, Tensor]:
    first, second = example(R, C)
    inverse = np.linalg.inv(dense(first, second))
    return two_terms(first, second), inverse, weights(R, C)


@pytest.mark.parametrize(("R", "C"), SHAPES)
def test_the_diagonalisation_gives_back_the_sum(R: int, C: int) -> None:
    first, second = example(R, C)
    found = two_terms(first, second)
    basis = torch.kron(found.B_G_RR, found.B_A_CC).numpy()
    rebuilt = basis @ np.diag(1.0 / found.E_RC.reshape(-1).numpy()) @ basis.T
    np.testing.assert_allclose(rebuilt, dense(first, second), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("R", "C"), SHAPES)
def test_diagonal_and_element_costs_equal_the_dense_inverse(R: int, C: int) -> None:
    found, inverse, W = solved(R, C)
    diagonal = np.diag(inverse).reshape(R, C)
    np.testing.assert_allclose(found.element_inverse_diagonal().numpy(), diagonal, rtol=1e-10)
    np.testing.assert_allclose(found.element_costs(W).numpy(), 0.5 * W.numpy() ** 2 / diagonal, rtol=1e-10)


@pytest.mark.parametrize(("R", "C"), SHAPES)
def test_row_and_column_costs_equal_the_dense_inverse(R: int, C: int) -> None:
    found, inverse, W = solved(R, C)
    blocks = inverse.reshape(R, C, R, C)
    w = W.numpy()
    rows = [0.5 * w[r] @ np.linalg.inv(blocks[r, :, r, :]) @ w[r] for r in range(R)]
    columns = [0.5 * w[:, c] @ np.linalg.inv(blocks[:, c, :, c]) @ w[:, c] for c in range(C)]
    np.testing.assert_allclose(found.row_costs(W).numpy(), rows, rtol=1e-10)
    np.testing.assert_allclose(found.column_costs(W).numpy(), columns, rtol=1e-10)


def test_a_row_cost_is_the_least_increase_with_that_row_at_zero() -> None:
    R, C = 3, 4
    first, second = example(R, C)
    F, W = dense(first, second), weights(R, C)
    costs = two_terms(first, second).row_costs(W)
    for r in range(R):
        free = [i * C + j for i, j in product(range(R), range(C)) if i != r]
        fixed = [r * C + j for j in range(C)]
        change = np.zeros(R * C)
        change[fixed] = -W[r].numpy()
        change[free] = -np.linalg.solve(F[np.ix_(free, free)], F[np.ix_(free, fixed)] @ change[fixed])
        assert float(costs[r]) == pytest.approx(0.5 * change @ F @ change, rel=1e-10)


def test_without_a_second_term_they_are_the_costs_of_one_product() -> None:
    from surgeon.costs import column_costs_obs, element_costs_obs, row_costs_obs

    first, _ = example(3, 4)
    found = two_terms(first, (torch.zeros(3, 3).double(), torch.zeros(4, 4).double()))
    W = weights(3, 4)
    g, a = (torch.linalg.inv(M).diagonal() for M in first)
    torch.testing.assert_close(found.row_costs(W), row_costs_obs(W, first[1], g))
    torch.testing.assert_close(found.column_costs(W), column_costs_obs(W, first[0], a))
    torch.testing.assert_close(found.element_costs(W), element_costs_obs(W, g, a))


def test_float32_factors_are_worked_on_in_float64() -> None:
    first, second = ((G.float(), A.float()) for G, A in example(3, 4))
    found = two_terms(first, second).element_inverse_diagonal()
    assert found.dtype == torch.float64
    inverse = np.linalg.inv(dense((first[0].double(), first[1].double()), (second[0].double(), second[1].double())))
    np.testing.assert_allclose(found.numpy().reshape(-1), np.diag(inverse), rtol=1e-10)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_sum_product_is_the_dense_product(K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    terms = [(spd(3, generator), spd(4, generator)) for _ in range(K)]
    P = weights(3, 4)
    F = sum(torch.kron(*term) for term in terms)
    torch.testing.assert_close(sum_product(terms, P).reshape(-1), F @ P.reshape(-1))


def test_none_in_a_product_is_the_identity() -> None:
    (G, A), P = example(3, 4)[0], weights(3, 4)
    torch.testing.assert_close(sum_product([(None, A), (G, None), (None, None)], P), P @ A + G @ P + P)


def test_an_indefinite_sum_shrinks_its_second_term_step_by_step() -> None:
    """Halved until every eigenvalue relative to the first term is at least a tenth, and no further."""
    first, second = example(3, 4, scale=5.0)
    both, extra = torch.kron(*first), torch.kron(*second)
    assert float(torch.linalg.eigvalsh(both + extra)[0]) < 0.0
    found = two_terms(first, second, layer="layers.3.q")
    assert found.shrink_step > 0
    assert found.scale == 0.5**found.shrink_step

    def least(scale: float) -> float:
        L = torch.linalg.cholesky(both)
        half = torch.linalg.solve_triangular(L, both + scale * extra, upper=False)
        return float(torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.T, upper=False))[0])

    assert least(found.scale) >= 0.1 > least(2 * found.scale)
    inverse = torch.linalg.inv(both + found.scale * extra).diagonal().reshape(3, 4)
    torch.testing.assert_close(found.element_inverse_diagonal(), inverse)


def test_a_definite_sum_is_left_as_it_is() -> None:
    first, second = example(3, 4)
    found = two_terms(first, second)
    assert (found.scale, found.shrink_step) == (1.0, 0)


def test_a_sum_beyond_the_last_step_is_an_error_that_names_the_layer() -> None:
    first, second = example(3, 4, scale=1e5)
    with pytest.raises(SingularFactorError, match=r"layers\.3\.q") as caught:
        two_terms(first, second, layer="layers.3.q")
    assert caught.value.layer == "layers.3.q"


@pytest.mark.parametrize("side", [0, 1])
def test_a_first_factor_that_is_not_positive_definite_is_an_error(side: int) -> None:
    first, second = example(3, 4)
    damaged = [M.clone() for M in first]
    damaged[side][1, 1] = -1.0
    with pytest.raises(SingularFactorError, match=f"factor {'GA'[side]} of layer q") as caught:
        two_terms((damaged[0], damaged[1]), second, layer="q")
    assert caught.value.index == 1


@pytest.mark.parametrize("which", [0, 1])
def test_a_factor_that_is_not_finite_is_an_error(which: int) -> None:
    pairs = example(3, 4)
    pairs[which][1][2, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="factor A of layer q"):
        two_terms(*pairs, layer="q")
