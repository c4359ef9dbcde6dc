"""Marginals of Markov chains that are given by probabilities, with derivatives of any order.

u_1 = π, u_{t+1} = u_t P_t and ξ_t = diag(u_t) P_t need one forward pass and no normaliser. That pass and its derivative are
the same affine recursion, one with the time turned round, so its backward pass is another call of itself.

Shapes: B sequences, T steps, K states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvmppl.exact.chain_steps import arithmetic, step_by_step


def marginals_of_probabilities(initial: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
    """u_t = q(z_t) [T, B, K] and ξ_t = q(z_t, z_{t+1}) [T-1, B, K, K] from π [B, K] and P [T-1, B, K, K].

    Where P_t is 0 throughout, as beyond the end of a sequence, so is everything after.
    """
    later = torch.zeros_like(initial).expand(len(transition), *initial.shape)
    unary = affine_recursion(torch.cat([initial.unsqueeze(0), later]), transition)
    return unary, unary[:-1].unsqueeze(-1) * transition


def affine_recursion(added: Tensor, matrices: Tensor) -> Tensor:
    """v_1 = c_1, v_{t+1} = v_t M_t + c_{t+1}: v [T, B, K] of c [T, B, K] and M [T-1, B, K, K].

    The adjoint w of v under ∂/∂v = g runs backwards, w_T = g_T, w_t = w_{t+1} M_tᵀ + g_t; then ∂/∂c = w and
    ∂/∂M_t = v_t ⊗ w_{t+1}.
    """
    result: Tensor = _AffineRecursion.apply(added, matrices)  # type: ignore[no-untyped-call]
    return result


class _AffineRecursion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, added: Tensor, matrices: Tensor) -> Tensor:
        values = _run(added, matrices)
        ctx.save_for_backward(matrices, values)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        matrices, values = ctx.saved_tensors
        adjoint = affine_recursion(grads[0].flip(0), matrices.flip(0).mT).flip(0)
        own = values[:-1].unsqueeze(-1) * adjoint[1:].unsqueeze(-2) if ctx.needs_input_grad[1] else None
        return adjoint, own


def _run(added: Tensor, matrices: Tensor) -> Tensor:
    """The recursion on plain numbers; one sequence takes vectors times matrices."""
    one = added.shape[1] == 1
    values = added.detach().contiguous().clone()
    on = arithmetic(values, shared=one)
    rows = on.views(values if one else values.unsqueeze(-2))  # [B, 1, K] each
    steps = on.views((matrices.squeeze(1) if one else matrices).detach())
    scratch = torch.empty_like(values[:1] if one else values[:1].unsqueeze(-2))
    (moved,) = on.views(scratch)
    with step_by_step(matrices[0].numel() if len(matrices) else 0):
        for before, matrix, after in zip(rows, steps, rows[1:], strict=False):
            on.product(before, matrix, out=moved)
            on.add(after, moved, out=after)
    return values


__all__ = ["affine_recursion", "marginals_of_probabilities"]
