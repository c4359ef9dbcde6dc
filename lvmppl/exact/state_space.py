"""Linear-Gaussian state-space models: a log joint of paths is found to be a block-tridiagonal quadratic, and solved.

3d + 1 gradients give the quadratic, whatever the number of steps is; `lvmppl.exact.block_tridiagonal` eliminates it in
O(T d³). Where that would cancel (a level of innovation variance 1e-6 beneath noise of variance 1), each level's precision
is measured anew, by gradients along paths that are the most probable between the steps left: what is stiff and would
drown the rest is then no part of them.

Shapes: ``B`` sequences (any shape ``rows``), ``T`` steps, ``d`` dims of the state, ``S`` points. Everything is in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvmppl.exact.block_tridiagonal import (
    BlockTridiagonal,
    Level,
    StateSpacePosterior,
    block_tridiagonal_posterior,
    prolonged,
    restricted,
)
from lvmppl.exact.evaluation import (
    CHUNK,
    ImproperPosterior,
    LogJoint,
    Rows,
    evaluate,
    row_shape,
    value_and_gradient,
    with_gradient,
)
from lvmppl.exact.gaussian import STEP, refuse_above_one, unwhiten

_CHECK_RADII = (0.5, 30.0, 1e3)
_MAX_CANCELLATION = 1e3  # from which levels are measured anew


def state_space_posterior(
    log_joint: LogJoint,
    num_rows: Rows,
    num_steps: int,
    dim: int,
    *,
    rtol: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    chunk: int = CHUNK,
) -> StateSpacePosterior:
    """The posterior of a log joint of ``z [S, B, T, d]`` that is a block-tridiagonal quadratic, with result ``[S, B]``
    or per-step terms ``[S, B, T]``; its log evidence is differentiable in θ.

    Every third time step is moved at once, so 3d + 1 gradients give all blocks whatever T is; they are taken
    twice, the second time at the mode and with each step's own scale. Gradient and value are then checked at
    random points: a log joint that is not quadratic, or couples steps further apart than one, raises
    ``NotQuadratic``.

    ∇_θ log Z = E_post[∇_θ log p] is averaged over 3d + 1 paths which have exactly the posterior's mean,
    marginal and consecutive covariances, so that it is exact for every quadratic of this form.
    """
    rows = row_shape(num_rows)
    total, chunk = _flat(log_joint, num_steps, dim), max(1, chunk // max(1, num_steps))
    centre = torch.zeros(*rows, num_steps, dim, dtype=dtype, device=device)
    one = torch.ones_like(centre)
    try:
        posterior = _posterior_at(total, centre, one, chunk)
    except ImproperPosterior:
        _check_tridiagonal(total, _coloured(total, centre, one, chunk), one, rtol, chunk)
        raise
    scale = posterior.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    posterior = _posterior_at(total, posterior.mean, STEP * scale, chunk)
    _check_tridiagonal(total, posterior.quadratic, scale, rtol, chunk)
    posterior = _with_error(total, posterior, chunk)
    if not torch.is_grad_enabled():
        return posterior
    paths, weights = posterior.nodes()
    paths = paths.flatten(-2)
    return replace(
        posterior, log_evidence=with_gradient(posterior.log_evidence, total, paths, weights, chunk)
    )


def _posterior_at(total: LogJoint, centre: Tensor, step: Tensor, chunk: int) -> StateSpacePosterior:
    """The posterior from gradients at and ``step [*rows, T, d]`` beside ``centre``: 3d + 1 of them, or so many for each
    of the log2 T levels where the elimination would cancel.
    """
    whole = _coloured(total, centre, step, chunk)
    parts = (whole.diag, whole.off, whole.linear, whole.const, whole.centre)
    try:
        found = block_tridiagonal_posterior(*parts)
        if bool((found.cancellation <= _MAX_CANCELLATION).all()):
            return found
    except ImproperPosterior:  # perhaps by rounding alone
        pass
    return block_tridiagonal_posterior(*parts, _Probe(total, centre, step, chunk))


def _with_error(total: LogJoint, posterior: StateSpacePosterior, chunk: int) -> StateSpacePosterior:
    """Beside ‖E‖², where levels were measured: log Z and E_post[log p(x, z)] + entropy, which are one if all is right."""
    if not bool((posterior.cancellation > _MAX_CANCELLATION).any()):
        return posterior
    paths, weights = posterior.nodes()
    bound = (weights * evaluate(total, paths.flatten(-2), chunk)).sum(0) + posterior.entropy
    difference = (bound - posterior.log_evidence).abs().nan_to_num(nan=0.0)
    return replace(posterior, log_evidence_error=posterior.log_evidence_error + difference)


@dataclass(frozen=True)
class _Probe:
    """The quadratic along paths that are the most probable between the steps left, by gradients: `Measured`."""

    total: LogJoint
    centre: Tensor
    step: Tensor
    chunk: int

    def left(self, levels: Sequence[Level]) -> tuple[Tensor, Tensor, Tensor]:
        step = self.step
        for _ in levels:
            step = step[..., 1::2, :]
        found = _coloured(self.total, self.centre, step, self.chunk, levels)
        return found.diag, found.off, found.linear

    def own(self, levels: Sequence[Level], factor: Tensor) -> Tensor:
        """All steps that are eliminated next move at once, as no two of them are neighbours: d + 1 gradients."""
        *rows, count, dim = factor.shape[:-1]
        white = STEP * torch.eye(dim).to(factor).view(dim, *[1] * (len(rows) + 1), dim)
        moves = unwhiten(factor, white.expand(dim, *rows, count, dim))
        steps = self.centre.shape[-2]
        for _ in levels:
            steps //= 2
        path = moves.new_zeros(dim, *rows, steps, dim)
        path[..., 0::2, :] = moves
        z = torch.cat([self.centre.unsqueeze(0), self.centre + prolonged(levels, path)])
        _, flat = value_and_gradient(self.total, z.flatten(-2), self.chunk)
        gradient = restricted(levels, flat.reshape(z.shape))[..., 0::2, :]
        change = torch.linalg.solve_triangular(
            factor, (gradient[0] - gradient[1:]).movedim(0, -1), upper=False
        )
        found = 0.5 * (change + change.mT) / STEP
        identity = torch.eye(dim).to(found)
        largest = self.centre.abs().amax((-2, -1))[..., None] * factor.abs().amax((-2, -1))
        noise = 8.0 * torch.finfo(found.dtype).eps * (1.0 + largest / STEP)  # z itself is rounded
        settled = (found - identity).abs().amax((-2, -1)) <= noise
        return torch.where(settled[..., None, None], identity, found)


def _flat(log_joint: LogJoint, num_steps: int, dim: int) -> LogJoint:
    """The log joint as a function of ``z [S, *rows, T·d]`` with result ``[S, *rows]``: per-step terms are
    summed.
    """

    def total(z: Tensor) -> Tensor:
        value = log_joint(z.reshape(*z.shape[:-1], num_steps, dim))
        return value.sum(-1) if value.dim() == z.dim() else value

    return total


def _coloured(
    total: LogJoint, centre: Tensor, step: Tensor, chunk: int, levels: Sequence[Level] = ()
) -> BlockTridiagonal:
    """All blocks of −Hessian from 3d + 1 gradients: moving steps t ≡ k (mod 3) reaches each block row through
    one of them only.

    levels: the steps are those left by these, with all others at their most probable; ``step [*rows, K, d]``.
    """
    *rows, steps, dim = step.shape
    time = torch.arange(steps, device=centre.device)
    colours = (time % 3 == torch.arange(3, device=centre.device)[:, None]).to(centre)  # [3, T]
    moves = torch.einsum("kt,ij->kitj", colours, torch.eye(dim).to(centre)).reshape(
        3 * dim, *[1] * len(rows), steps, dim
    )
    z = torch.cat([centre.unsqueeze(0), centre + prolonged(levels, moves * step)])
    value, flat = value_and_gradient(total, z.flatten(-2), chunk)
    gradient = restricted(levels, flat.reshape(z.shape))
    change = (gradient[0] - gradient[1:]).reshape(3, dim, *step.shape).movedim(-2, 0)  # [T, 3, i, *rows, j]

    def block(row: Tensor, column: Tensor) -> Tensor:
        picked = change[row, column % 3].movedim(1, -1).movedim(0, -3)  # [*rows, ·, j, i]
        scaled: Tensor = picked / step[..., column, :].unsqueeze(-2)
        return scaled

    own, below, above = block(time, time), block(time[1:], time[:-1]), block(time[:-1], time[1:])
    dead = value[0] == -torch.inf  # density 0 everywhere: log Z = −∞ and a placeholder posterior
    diag = torch.where(dead[..., None, None, None], torch.eye(dim).to(centre), 0.5 * (own + own.mT))
    off = (0.5 * (below + above.mT)).masked_fill(dead[..., None, None, None], 0.0)
    return BlockTridiagonal(diag, off, gradient[0].masked_fill(dead[..., None, None], 0.0), value[0], centre)


def _check_tridiagonal(
    total: LogJoint, quadratic: BlockTridiagonal, scale: Tensor, rtol: float | None, chunk: int
) -> None:
    """Compare gradient and value with the quadratic at random paths on both sides, near and far."""
    epsilon = torch.finfo(scale.dtype).eps
    rtol = 4.0 * epsilon ** (2.0 / 3.0) if rtol is None else rtol
    generator = torch.Generator(device=scale.device).manual_seed(0)
    shape, lead = (len(_CHECK_RADII), *scale.shape), (-1, *[1] * scale.dim())
    white = torch.randn(shape, generator=generator, dtype=scale.dtype, device=scale.device)
    white = white * torch.tensor(_CHECK_RADII).to(scale).view(lead)
    w = torch.cat([white, -white]) * scale
    value, flat = value_and_gradient(total, (quadratic.centre + w).flatten(-2), chunk)
    found = flat.reshape(w.shape)
    expected_value, expected = _predicted(quadratic, w)
    size = (scale * (found.abs() + expected.abs())).amax((-2, -1)) + 1.0
    ratio = ((found - expected).abs() * scale).amax((-2, -1)) / (64.0 * epsilon**0.5 * size)
    still = torch.tensor([-3.0, -1.0, 1.0, 3.0]).to(scale).view(lead) * epsilon**0.5 * scale
    noise = (evaluate(total, (quadratic.centre + still).flatten(-2), chunk) - quadratic.const).abs().amax(0)
    noise = noise.nan_to_num(nan=0.0, posinf=0.0).clamp(max=epsilon**0.25)
    tolerance = rtol * (value.abs() + quadratic.const.abs() + 1.0) + 30.0 * noise * size
    ratio = torch.maximum(ratio, (value - expected_value).abs() / tolerance).nan_to_num(nan=torch.inf).amax(0)
    dead = (quadratic.const == -torch.inf) & (value == -torch.inf).all(0)
    refuse_above_one(
        ratio.masked_fill(dead, 0.0), "it is no quadratic whose steps are tied to their neighbours alone"
    )


def _predicted(quadratic: BlockTridiagonal, w: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``[S, B]`` and gradient ``[S, B, T, d]`` of the quadratic at ``w [S, B, T, d]`` from its
    centre.
    """
    diagonal = (quadratic.diag @ w.unsqueeze(-1)).squeeze(-1)
    lower = (quadratic.off @ w[..., :-1, :].unsqueeze(-1)).squeeze(-1)
    upper = (quadratic.off.mT @ w[..., 1:, :].unsqueeze(-1)).squeeze(-1)
    zero = torch.zeros_like(w[..., :1, :])
    gradient = quadratic.linear - diagonal - torch.cat([zero, lower], -2) - torch.cat([upper, zero], -2)
    return quadratic.const + 0.5 * (w * (quadratic.linear + gradient)).sum((-2, -1)), gradient
