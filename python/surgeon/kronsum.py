"""Curvature that is a sum of Kronecker products: ``F = G₁⊗A₁ + G₂⊗A₂ (+ …)``. Pure tensor mathematics.

``F`` acts on the row-major ``vec(W)``, so ``F vec(P) = vec(Σ_k G_k P A_k)`` for symmetric factors.

Two terms are diagonalised together. With ``G₁ = L_G L_Gᵀ``, ``A₁ = L_A L_Aᵀ`` and the eigenvalue
decompositions ``L_G⁻¹ G₂ L_G⁻ᵀ = U diag(s_G) Uᵀ``, ``L_A⁻¹ A₂ L_A⁻ᵀ = V diag(s_A) Vᵀ``:

    F   = (B_G ⊗ B_A) (I + diag(s_G ⊗ s_A)) (B_G ⊗ B_A)ᵀ      B_G = L_G U,     B_A = L_A V
    F⁻¹ = (P_G ⊗ P_A) (I + diag(s_G ⊗ s_A))⁻¹ (P_G ⊗ P_A)ᵀ    P_G = L_G⁻ᵀ U,   P_A = L_A⁻ᵀ V

(LLM Surgeon, appendix, rank-2 expansion; Golub & Van Loan, simultaneous diagonalisation.) A truncated
sum can be indefinite though the Fisher is not; then there is no minimum to speak of, and an error says so.

Shapes: ``W_RC [R, C]``, ``G_RR [R, R]``, ``A_CC [C, C]``; R or C as a lone suffix is a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import NonFiniteError, SingularFactorError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# The second of two nearest Kronecker terms is indefinite, and on real models their sum mostly is too. It is
# then halved until every eigenvalue, relative to the first term's, is at least this.
SMALLEST_EIGENVALUE = 0.1
MOST_HALVINGS = 20


@dataclass(frozen=True)
class TwoTerms:
    """``G₁⊗A₁ + G₂⊗A₂``, diagonalised, in float64; :func:`two_terms` makes it.

    Attributes:
        B_G_RR: ``L_G U``, so that ``B_Gᵀ W B_A`` are the weights in the common basis.
        B_A_CC: ``L_A V``.
        P_G_RR: ``L_G⁻ᵀ U``, the inverse of ``B_Gᵀ``.
        P_A_CC: ``L_A⁻ᵀ V``.
        E_RC: ``1 / (1 + t · s_G s_Aᵀ)``, all positive: the eigenvalues of ``F⁻¹`` in that basis.
        scale: t, what the second term was multiplied by.
        shrink_step: 0 if the sum was positive definite as it was, else how many halvings it took.
    """

    B_G_RR: Tensor
    B_A_CC: Tensor
    P_G_RR: Tensor
    P_A_CC: Tensor
    E_RC: Tensor
    scale: float
    shrink_step: int

    def element_inverse_diagonal(self) -> Tensor:
        """``diag(F⁻¹)`` as ``[R, C]``: ``(P_G∘P_G) · 1/(1 + s_G s_Aᵀ) · (P_A∘P_A)ᵀ``."""
        return self.P_G_RR.square() @ self.E_RC @ self.P_A_CC.square().T

    def element_costs(self, W_RC: Tensor) -> Tensor:
        """``½ W_rc² / [F⁻¹]_rc,rc``, ``[R, C]``: a weight goes and all others adapt."""
        return 0.5 * W_RC.double().square() / self.element_inverse_diagonal()

    def row_costs(self, W_RC: Tensor) -> Tensor:
        """``½ w_rᵀ ([F⁻¹]_rr)⁻¹ w_r``, ``[R]``: a row goes and all others adapt.

        ``[F⁻¹]_rr = P_A diag(q_r) P_Aᵀ`` with ``q = (P_G∘P_G) · 1/(1 + s_G s_Aᵀ)``, so the cost is
        ``½ Σ_c (W B_A)²_rc / q_rc``.
        """
        q_RC = self.P_G_RR.square() @ self.E_RC
        return 0.5 * ((W_RC.double() @ self.B_A_CC).square() / q_RC).sum(1)

    def column_costs(self, W_RC: Tensor) -> Tensor:
        """``½ w_cᵀ ([F⁻¹]_cc)⁻¹ w_c``, ``[C]``: a column goes and all others adapt; :meth:`row_costs` mirrored."""
        q_RC = self.E_RC @ self.P_A_CC.square().T
        return 0.5 * ((self.B_G_RR.T @ W_RC.double()).square() / q_RC).sum(0)


def two_terms(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, layer: str | None = None) -> TwoTerms:
    """Diagonalise ``G₁⊗A₁ + G₂⊗A₂``.

    Args:
        first: ``(G₁ [R, R], A₁ [C, C])``, positive definite: damp them before.
        second: ``(G₂, A₂)``, symmetric; they may be indefinite.
        layer: name, for messages.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
        SingularFactorError: a first factor is not positive definite, or the sum is not even with the last
            step's part of the second term. Nothing is clamped.
    """
    B_G, P_G, s_R = _side(first[0], second[0], "G", layer)
    B_A, P_A, s_C = _side(first[1], second[1], "A", layer)
    products_RC = s_R[:, None] * s_C[None, :]
    low = float(products_RC.min()) if products_RC.numel() else 0.0
    for step in range(MOST_HALVINGS + 1):
        scale = 0.5**step
        if 1.0 + scale * low >= SMALLEST_EIGENVALUE:
            return TwoTerms(B_G, B_A, P_G, P_A, (1.0 + scale * products_RC).reciprocal(), scale, step)
    raise SingularFactorError(
        f"the sum of two Kronecker terms of layer {layer} is not positive definite even with {scale:.2g} of the "
        "second: use one term, more calibration samples or more damping",
        layer=layer,
    )


def sum_product(terms: Sequence[tuple[Tensor | None, Tensor | None]], P_RC: Tensor) -> Tensor:
    """``F vec(P)`` as ``[R, C]``: ``Σ_k G_k P A_k``, in the dtype of its arguments.

    Args:
        terms: ``(G_k, A_k)``, symmetric, any number from 1; None is the identity.
        P_RC: what F is applied to.
    """
    total: Tensor | None = None
    for G_RR, A_CC in terms:
        product = P_RC if G_RR is None else G_RR @ P_RC
        if A_CC is not None:
            product = product @ A_CC
        total = product if total is None else total + product
    assert total is not None, "a sum needs a term"
    return total


def _side(first_nn: Tensor, second_nn: Tensor, what: str, layer: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """``B = L U``, ``P = L⁻ᵀ U`` and the eigenvalues s of ``L⁻¹ second L⁻ᵀ``, in float64."""
    if not bool(torch.isfinite(first_nn).all() and torch.isfinite(second_nn).all()):
        raise NonFiniteError(f"a curvature factor {what} of layer {layer} is not finite", layer=layer)
    L_nn, info = torch.linalg.cholesky_ex(first_nn.double())
    if int(info) != 0:
        raise SingularFactorError(
            f"curvature factor {what} of layer {layer} is not positive definite: give it more calibration samples "
            f"or a larger --damping-{what.lower()}",
            layer=layer,
            index=int(info) - 1,
        )
    half_nn = torch.linalg.solve_triangular(L_nn, second_nn.double(), upper=False)
    middle_nn = torch.linalg.solve_triangular(L_nn, half_nn.T, upper=False)
    s_n, U_nn = torch.linalg.eigh(0.5 * (middle_nn + middle_nn.T))
    return L_nn @ U_nn, torch.linalg.solve_triangular(L_nn.T, U_nn, upper=True), s_n
