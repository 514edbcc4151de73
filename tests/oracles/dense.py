"""Slow float64 truths about one layer, with the dense Kronecker product."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def damped(M: Tensor, relative: float) -> Tensor:
    return M + relative * M.diagonal().mean() * torch.eye(M.shape[0], dtype=M.dtype)


def quadratic(D_RC: Tensor, G_RR: Tensor, A_CC: Tensor) -> float:
    """½ vec(Δ)ᵀ (G ⊗ A) vec(Δ), row-major."""
    d = D_RC.reshape(-1)
    return float(0.5 * d @ torch.kron(G_RR, A_CC) @ d)


def kkt_optimum(W_RC: Tensor, keep_RC: Tensor, G_RR: Tensor, A_CC: Tensor) -> Tensor:
    """Weights with the others at zero that minimise the quadratic model, by one dense solve.

    Minimise ½ (x − w)ᵀ F (x − w) subject to x = 0 where removed, by the full KKT system
    [F Eᵀ; E 0] [x; λ] = [F w; 0].
    """
    F = torch.kron(G_RR, A_CC).numpy()
    w = W_RC.reshape(-1).numpy()
    gone = np.flatnonzero(~keep_RC.reshape(-1).numpy())
    n, m = len(w), len(gone)
    system = np.zeros((n + m, n + m))
    system[:n, :n] = F
    system[n + np.arange(m), gone] = 1.0
    system[gone, n + np.arange(m)] = 1.0
    solution = np.linalg.solve(system, np.concatenate([F @ w, np.zeros(m)]))
    return torch.from_numpy(solution[:n]).reshape(W_RC.shape)
