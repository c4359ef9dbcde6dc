"""Parameters that enter locations only, and affinely: the M-step is weighted least squares.

With every other parameter held, Q(θ) = Σ_s ⟨q_s, f_s(θ)⟩ is a quadratic in such entries β (loadings and offsets of a
factor analysis, slopes of regressions, the dynamics of a linear-Gaussian state space), so that one Newton step

    β ← β − H⁻¹ ∇Q(β)        H = ∇²Q

maximises it. H comes from products with it by automatic differentiation: entries that no common location sees never meet
in H (rows of a loading matrix, say), so one product serves many columns at once (Curtis, Powell & Reid 1974). Conjugate
gradients with that matrix as preconditioner need one step, and stay right should a coupling have been missed.

Shapes: P entries of all parameters together, C products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lvmppl.algorithms.expected import Weights, expected_log_joint
from lvmppl.algorithms.problem import Problem
from lvmppl.density import Rows, Values
from lvmppl.exponential import read_factor

FEW_ROWS = 256  # rows from which couplings are read
MAX_ENTRIES = 2000  # entries whose [P, P] matrix is solved; more are left to the gradient
_ITERATIONS = 20  # conjugate gradients; one is enough where no coupling was missed
_RELATIVE = 1e-13  # of the residual's first norm in the preconditioner's metric, squared


@dataclass(frozen=True)
class Affine:
    """Parameters solved together by least squares: their sizes, and which pairs of entries meet in H [P, P]."""

    sizes: Mapping[str, int]
    meets: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    def without(self, names: set[str]) -> Affine | None:
        """The parameters that are left, None if there are none."""
        keep = torch.cat([torch.full((n,), name not in names) for name, n in self.sizes.items()])
        sizes = {n: s for n, s in self.sizes.items() if n not in names}
        return Affine(sizes, self.meets[keep][:, keep]) if sizes else None

    @cached_property
    def colours(self) -> Tensor:
        """[P]: entries of one colour have no row of H in common, so that one product yields all their columns."""
        touched = self.meets.double()
        conflict = (touched.T @ touched) > 0
        colours = torch.full((len(conflict),), -1)
        for entry in range(len(conflict)):
            taken = set(colours[conflict[entry]].tolist())
            colours[entry] = next(c for c in range(len(conflict)) if c not in taken)
        return colours


def solve_affine(problem: Problem, affine: Affine, values: Values, weights: Weights) -> dict[str, Tensor]:
    """θ with the affine parameters at the maximum of Q, the others as they are."""
    start = torch.cat([values[n].reshape(-1) for n in affine.names])
    gradient, product = _quadratic(problem, affine, values, weights)
    colours = affine.colours
    matrix = torch.zeros_like(affine.meets, dtype=start.dtype)
    for colour in range(int(colours.max()) + 1):
        seed = (colours == colour).to(start.dtype)
        columns = torch.nonzero(colours == colour).flatten()
        own = affine.meets[:, columns]
        matrix[:, columns] = torch.where(own, product(seed).unsqueeze(-1), 0.0)
    step = _conjugate_gradients(product, _pseudo_inverse(-(matrix + matrix.T) / 2), gradient)
    solved = (start + step).split(list(affine.sizes.values()))
    new = {n: part.reshape(values[n].shape) for n, part in zip(affine.names, solved, strict=True)}
    return {**values, **new}


def couplings(problem: Problem, names: Sequence[str], values: Values, weights: Weights) -> Tensor:
    """Which pairs of entries have a second derivative of Q that is not zero: [P, P] booleans."""
    sizes = {n: values[n].numel() for n in names}
    total = sum(sizes.values())
    _, product = _quadratic(problem, Affine(sizes, torch.zeros(0)), values, weights)
    eye = torch.eye(total, dtype=values[names[0]].dtype)
    meets = torch.stack([product(row) for row in eye]) != 0
    return meets | meets.T | eye.bool()


def bent(
    problem: Problem, names: Sequence[str], sites: Mapping[str, Sequence[str]], kinds: Mapping[str, str]
) -> dict[str, str]:
    """Of the parameters, those in which the location of a site (the first one is named) is not affine, all taken together.

    problem: with continuous sites held. sites: of each parameter, those whose location is computed from it. kinds: of
    these sites.
    """
    if not names:
        return {}
    generator = torch.Generator().manual_seed(11)
    one, two = ({n: _noise(problem.initial[n], generator) for n in names} for _ in range(2))
    middle = {n: (one[n] + two[n]) / 2 for n in names}
    first, second, mid = ({s: t for s, t in _locations(problem, own, kinds)} for own in (one, two, middle))
    result: dict[str, str] = {}
    for site, found in mid.items():
        expected = (first[site] + second[site]) / 2
        tolerance = torch.finfo(found.dtype).eps ** 0.75 * (1 + found.abs() + expected.abs())
        if not bool(((found - expected).abs() <= tolerance).all()):
            result.update({n: result.get(n, site) for n in names if site in sites[n]})
    return result


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _locations(problem: Problem, values: Values, kinds: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        views, _ = problem.model.view(problem.data, {**problem.initial, **values}, Rows(problem.num_rows))
        for site, kind in kinds.items():
            reading = read_factor(views, site, kind)
            assert reading is not None, "a site's family does not change between values of θ"
            yield site, reading.fields["loc"].tensor


def _quadratic(problem: Problem, affine: Affine, values: Values, weights: Weights):  # type: ignore[no-untyped-def]
    """∇Q at the present entries [P], and v ↦ ∇²Q v."""
    leaves = {n: values[n].detach().clone().requires_grad_() for n in affine.names}
    with torch.enable_grad():
        total = expected_log_joint(problem, {**values, **leaves}, weights)
        flat = _flat(torch.autograd.grad(total, list(leaves.values()), create_graph=True))

    def product(v: Tensor) -> Tensor:
        if not flat.requires_grad:
            return torch.zeros_like(v)
        found = torch.autograd.grad(
            flat, list(leaves.values()), v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _flat(found)

    return flat.detach(), product


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in parts])


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Of a positive semidefinite matrix: directions that Q does not depend on stay where they are."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    if int(info) == 0 and float(diagonal.min()) > 1e-6 * float(diagonal.max()):
        return torch.cholesky_inverse(factor)
    inverse: Tensor = torch.linalg.pinv(
        matrix, rtol=torch.finfo(matrix.dtype).eps * len(matrix), hermitian=True
    )
    return inverse


def _conjugate_gradients(product, inverse: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """x with −H x = ∇Q."""
    x, residual = torch.zeros_like(gradient), gradient
    z = inverse @ residual
    direction, rho = z, residual @ z
    first = rho
    for _ in range(_ITERATIONS):
        if not float(rho) > _RELATIVE**2 * float(first):
            break
        image = -product(direction)
        bend = direction @ image
        if not float(bend) > 0:
            break
        rate = rho / bend
        x, residual = x + rate * direction, residual - rate * image
        z = inverse @ residual
        rho, before = residual @ z, rho
        direction = z + (rho / before) * direction
    return x
