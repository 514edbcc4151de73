"""Moments, damping ladder and what is read off Cholesky factors."""

from __future__ import annotations

import pytest
import torch

from surgeon import linalg
from surgeon.errors import NonFiniteError, SingularFactorError
from tests.conftest import spd


@pytest.mark.parametrize("n", [1, 5, linalg.MOMENT_BLOCK, 2 * linalg.MOMENT_BLOCK, 2 * linalg.MOMENT_BLOCK + 37])
def test_second_moment_equals_the_full_product(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    M = torch.zeros(n, n, dtype=torch.float64)
    expected = torch.zeros_like(M)
    for _ in range(2):
        X = torch.randn(11, n, generator=g, dtype=torch.float64)
        linalg.add_second_moment_(M, X)
        expected += X.T @ X
    linalg.mirror_upper_(M)
    torch.testing.assert_close(M, expected)
    assert torch.equal(M, M.T)


def test_inverse_diagonal_and_columns() -> None:
    M = spd(9, torch.Generator().manual_seed(0)) + 0.1 * torch.eye(9)
    L = torch.linalg.cholesky(M)
    inverse = torch.linalg.inv(M)
    torch.testing.assert_close(linalg.inverse_diagonal(L), inverse.diagonal(), rtol=1e-10, atol=0)
    index = torch.tensor([7, 0, 3])
    torch.testing.assert_close(linalg.inverse_columns(L, index), inverse[:, index], rtol=1e-9, atol=1e-12)


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    M = spd(6, torch.Generator().manual_seed(1))
    found = linalg.damped_cholesky(M, 0.05, what="A")
    expected = M + 0.05 * M.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(found.L_nn @ found.L_nn.T, expected)
    assert (found.ladder_step, found.relative) == (0, 0.05)


def test_ladder_climbs_and_says_so() -> None:
    M = torch.diag(torch.tensor([1.0, 1.0, -0.2], dtype=torch.float64))
    found = linalg.damped_cholesky(M, 0.05, what="G", layer="some.layer")  # mean diagonal 0.6: needs over 0.333
    assert (found.ladder_step, found.relative) == (1, 0.5)
    assert linalg.damped_cholesky(torch.zeros(2, 2) + torch.eye(2), 0.0, what="G").ladder_step == 0


def test_after_the_last_step_of_the_ladder_an_error_names_the_layer() -> None:
    M = torch.diag(torch.tensor([1.0, -1000.0, 1.0], dtype=torch.float64))
    with pytest.raises(SingularFactorError, match=r"some\.layer") as caught:
        linalg.damped_cholesky(M, 0.01, what="A", layer="some.layer")
    assert caught.value.layer == "some.layer"
    assert caught.value.index == 0 or caught.value.index == 1


def test_non_finite_factor_names_layer_and_row() -> None:
    M = torch.eye(4)
    M[2, 1] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        linalg.damped_cholesky(M, 0.01, what="A", layer="some.layer")
    assert (caught.value.layer, caught.value.index) == ("some.layer", 2)


def test_float64_where_conditioning_asks() -> None:
    """The bound never promises float32 to a matrix whose condition number is beyond it."""
    well = spd(40, torch.Generator().manual_seed(2)).float()
    assert linalg.solve_dtype(well, 0.1) == torch.float32
    assert linalg.solve_dtype(well, 1e-9) == torch.float64
    assert linalg.solve_dtype(well, 0.0) == torch.float64
    assert linalg.solve_dtype(well.double(), 0.1) == torch.float64
    direction = torch.ones(400, 1)
    ill = direction @ direction.T + 1e-3 * torch.eye(400)
    assert linalg.solve_dtype(ill, 1e-3) == torch.float64
    for M, relative in ((well, 0.1), (ill, 0.02)):
        damping = relative * float(M.diagonal().mean())
        values = torch.linalg.eigvalsh(M.double())
        bound = float(M.abs().sum(0).max()) / damping
        assert float((values[-1] + damping) / (values[0] + damping)) <= bound + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_pivot_of_mere_rounding_climbs_the_ladder(dtype: torch.dtype) -> None:
    """Fewer tokens than inputs and no damping: a factorisation may go through and mean nothing."""
    X = torch.randn(6, 24, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = linalg.damped_cholesky(X.T @ X / 6, 0.0, what="A")
    assert found.ladder_step >= 1
    assert found.relative >= 1e-7


def test_the_ladder_starts_from_its_floor_where_next_to_nothing_was_asked_for() -> None:
    X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    assert linalg.damped_cholesky(X.T @ X, 1e-12, what="A").relative >= 1e-7


def test_a_singular_block_names_its_row() -> None:
    M = torch.eye(4, dtype=torch.float64)
    M[2, 2] = 1e-18
    with pytest.raises(SingularFactorError, match="singular at row 2") as caught:
        linalg.block_cholesky(M)
    assert caught.value.index == 2
