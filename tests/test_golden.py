"""Parity with the public implementation on small layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from surgeon import costs, update
from surgeon.linalg import damped_cholesky, inverse_diagonal

GOLDEN = Path(__file__).parent / "golden"
CASES = ("plain", "bias", "damped", "dead")


class Layer:
    """One golden layer in float64, on its alive sub-matrix."""

    def __init__(self, case: str) -> None:
        raw = load_file(GOLDEN / f"{case}.safetensors")
        self.raw = raw
        W = raw["W"].double()
        if "b" in raw:
            W = torch.cat([W, raw["b"].double()[:, None]], 1)
        self.full = W
        self.rows = (~raw["dead_rows"].bool()).nonzero().flatten()
        self.columns = (~raw["dead_cols"].bool()).nonzero().flatten()
        self.W = W[self.rows][:, self.columns]
        self.A = raw["A"].double()[self.columns][:, self.columns]
        self.G = raw["G"].double()[self.rows][:, self.rows]
        self.chol_A = damped_cholesky(self.A, float(raw["damp_a"]), what="A")
        self.chol_G = damped_cholesky(self.G, float(raw["damp_g"]), what="G")

    def spread(self, W: Tensor) -> Tensor:
        full = torch.zeros_like(self.full)
        full[self.rows[:, None], self.columns[None, :]] = W
        return full

    def close(self, actual: Tensor, name: str) -> None:
        """Costs to 1e-4 each; weights, which may lie next to zero, to the scale of the largest too."""
        expected = self.raw[name].double()
        slack = 2e-5 * float(expected.abs().max()) if name.startswith("updated") else 0.0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=slack)


@pytest.fixture(params=CASES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer(request.param)


def test_costs_with_update(layer: Layer) -> None:
    g, a = inverse_diagonal(layer.chol_G.L_nn), inverse_diagonal(layer.chol_A.L_nn)
    layer.close(costs.row_costs_obs(layer.W, layer.A, g), "cost_obs_row")
    layer.close(costs.column_costs_obs(layer.W, layer.G, a), "cost_obs_column")
    layer.close(costs.element_costs_obs(layer.W, g, a), "cost_obs_element")


def test_costs_without_update(layer: Layer) -> None:
    layer.close(costs.row_costs_obd(layer.W, layer.A, layer.G), "cost_obd_row")
    layer.close(costs.column_costs_obd(layer.W, layer.A, layer.G), "cost_obd_column")
    layer.close(costs.element_costs_obd(layer.W, layer.A, layer.G), "cost_obd_element")


def test_row_update(layer: Layer) -> None:
    rows = (layer.raw["cost_obs_row"] <= layer.raw["row_threshold"]).nonzero().flatten()
    assert 0 < rows.numel() < layer.W.shape[0]
    layer.close(layer.spread(update.remove_rows(layer.W, layer.chol_G.L_nn, layer.A, rows).W_RC), "updated_rows_only")


def test_column_update(layer: Layer) -> None:
    columns = (layer.raw["cost_obs_column"] <= layer.raw["column_threshold"]).nonzero().flatten()
    assert 0 < columns.numel() < layer.W.shape[1]
    new = update.remove_columns(layer.W, layer.chol_A.L_nn, layer.G, columns).W_RC
    layer.close(layer.spread(new), "updated_columns_only")


def test_element_update(layer: Layer) -> None:
    keep = layer.raw["cost_obs_element"] > layer.raw["element_threshold"]
    assert 0 < int((~keep).sum()) < keep.numel()
    G = layer.chol_G.L_nn @ layer.chol_G.L_nn.T
    A = layer.chol_A.L_nn @ layer.chol_A.L_nn.T
    new = update.remove_elements(layer.W, keep, [(G, A)], steps=2000, tolerance=0.0).W_RC
    layer.close(layer.spread(new), "updated_elements")
