"""The maximum of a smooth function from as few batches of its values as can be: those on a Chebyshev grid over a box.

The polynomial through them is maximised in place of the function. Its last coefficients say whether it follows the
function; where it does not, as over a kink, the box is narrowed around the best point, and where the maximum is at a
face, it is moved there (Trefethen, *Approximation Theory and Approximation Practice*, SIAM 2013, chs. 3 and 8).

Shapes: ``P`` searches a row, ``N`` rows, ``d`` dims, ``n`` nodes an axis, ``S = nᵈ``. Values in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvmppl.exact.evaluation import CHUNK, LogJoint, evaluate

NODES = {1: 17, 2: 13, 3: 11}
ROUNDS = 40
NEWTON_STEPS = 16
RESOLVED = 1e-10  # of the last coefficients, relative to 1 + |value|
NARROWED, MOVED = 0.25, 2.0


def maximised(function: LogJoint, centre: Tensor, half: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The highest points ``[P, N, d]`` of ``function(t [S, N, d]) -> [S, N]`` near boxes ``centre ± half [P, N, d]``, and
    their values ``[P, N]``.

    One batch where the function is smooth over the boxes and highest inside; at most ``ROUNDS``. The points of a box
    in which the function is −∞ throughout are those it was centred at, with value −∞.
    """
    dim, n = centre.shape[-1], NODES[centre.shape[-1]]
    axis = -torch.cos(torch.arange(n).to(centre) * (math.pi / (n - 1)))
    grid = torch.cartesian_prod(*[axis] * dim).view(-1, 1, 1, dim)  # [S, 1, 1, d]
    best, value = centre, torch.full_like(centre[..., 0], -torch.inf)
    running = torch.ones_like(value, dtype=torch.bool)
    for _ in range(ROUNDS):
        t = centre + half * grid
        values = evaluate(function, t.flatten(0, 1), chunk).view(len(grid), *value.shape)
        found, height, resolved = _highest(values, axis, dim)
        inner = (found.abs() < 0.999).all(-1)
        gain = torch.where(running, height - value, 0.0)
        better = gain > 0
        best = torch.where(better.unsqueeze(-1), centre + half * found, best)
        value = torch.where(better, height, value)
        slight = RESOLVED * (1.0 + value.abs())
        width = (half / (1.0 + best.abs())).amax(-1)
        running = running & (value > -torch.inf) & ~(resolved & (inner | (gain <= slight)))
        running = running & (width > torch.finfo(width.dtype).eps)
        if not running.any():
            break
        centre = torch.where(running.unsqueeze(-1), best, centre)
        half = torch.where(
            running.unsqueeze(-1), half * torch.where(resolved, MOVED, NARROWED).unsqueeze(-1), half
        )
    return best, value


def _highest(values: Tensor, axis: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """From values ``[S, P, N]`` on the grid over [−1, 1]ᵈ: the highest point ``[P, N, d]`` of the polynomial through
    them, its height ``[P, N]``, and whether the polynomial is the function. Where it is not, the highest node.
    """
    n, rows = len(axis), values.shape[1:]
    top, index = values.max(0)
    node = torch.cartesian_prod(*[axis] * dim).view(-1, dim)[index]  # [P, N, d]
    finite = values.isfinite().all(0)
    to_coefficients = torch.linalg.inv(_chebyshev(axis, n).T)  # [k, j]
    table = torch.where(finite, values, 0.0).view(*[n] * dim, *rows)
    for i in range(dim):
        table = torch.tensordot(to_coefficients, table.movedim(i, 0), 1).movedim(0, i)
    last = torch.stack([table.movedim(i, 0)[-2:].abs().amax(tuple(range(dim))) for i in range(dim)]).amax(0)
    resolved = finite & (last <= RESOLVED * (1.0 + top.abs()))
    point = _climbed(table, node)
    height = _at(table, point)
    resolved &= height >= top - RESOLVED * (1.0 + top.abs())
    return torch.where(resolved.unsqueeze(-1), point, node), torch.where(resolved, height, top), resolved


def _climbed(table: Tensor, point: Tensor) -> Tensor:
    """Newton's way from ``point [P, N, d]`` to a maximum of the polynomial within [−1, 1]ᵈ, its Hessian made definite."""
    dim = point.shape[-1]
    slopes = [_derivative(table, i) for i in range(dim)]
    bends = [[_derivative(s, j) for j in range(dim)] for s in slopes]
    value, rate = _at(table, point), torch.ones_like(point[..., 0])
    for _ in range(NEWTON_STEPS):
        gradient = torch.stack([_at(s, point) for s in slopes], -1)
        hessian = torch.stack([torch.stack([_at(b, point) for b in row], -1) for row in bends], -2)
        # at a face, what points outwards is no direction to go
        free = ~(((point >= 1.0) & (gradient > 0)) | ((point <= -1.0) & (gradient < 0)))
        both = free.unsqueeze(-1) & free.unsqueeze(-2)
        eigenvalues, vectors = torch.linalg.eigh(torch.where(both, hessian, 0.0))
        size = eigenvalues.abs()
        size = size.clamp(min=1e-12).maximum(1e-6 * size.amax(-1, keepdim=True))
        step = (vectors @ ((vectors.mT @ (gradient * free).unsqueeze(-1)) / size.unsqueeze(-1))).squeeze(-1)
        moved = (point + rate.unsqueeze(-1) * step).clamp(-1.0, 1.0)
        reached = _at(table, moved)
        better = reached >= value
        point = torch.where(better.unsqueeze(-1), moved, point)
        value, rate = torch.where(better, reached, value), torch.where(better, 1.0, 0.25 * rate)
    return point


def _chebyshev(u: Tensor, n: int) -> Tensor:
    """T_k(u) = cos(k arccos u) for k < n: ``[n, *u]``."""
    order = torch.arange(n).to(u).view(-1, *[1] * u.dim())
    values: Tensor = (order * u.clamp(-1.0, 1.0).acos()).cos()
    return values


def _at(table: Tensor, point: Tensor) -> Tensor:
    """The polynomial with Chebyshev coefficients ``table [n, …, n, P, N]`` at ``point [P, N, d]``: ``[P, N]``."""
    for i in range(point.shape[-1]):
        basis = _chebyshev(point[..., i], len(table))  # [n, P, N]
        table = (table * basis.view(len(table), *[1] * (table.dim() - basis.dim()), *basis.shape[1:])).sum(0)
    return table


def _derivative(table: Tensor, axis: int) -> Tensor:
    """The coefficients of the derivative along one axis: T_k' = 2k Σ T_j over j < k of other parity, T_0 halved."""
    n = table.shape[axis]
    k, j = torch.arange(n).view(1, -1), torch.arange(n).view(-1, 1)
    matrix = torch.where((j < k) & ((k - j) % 2 == 1), 2.0 * k, 0.0).to(table)
    matrix[0] *= 0.5
    slope: Tensor = torch.tensordot(matrix, table.movedim(axis, 0), 1).movedim(0, axis)
    return slope


__all__ = ["maximised"]
