"""Whether an M-step arrived: the gradient of Q by automatic differentiation through the model itself.

Coordinates are unconstrained ones up to a factor: for a simplex those of the softmax, p (G − ⟨p, G⟩), for bounds l < θ < u
those of the logarithm or the logit; elsewhere Pyro's own. At a boundary (an exact zero, a bound that a solution was
moved to, a variance held at its floor) they vanish on their own, and the condition is that of Karush, Kuhn & Tucker: the
gradient must not point inwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.distributions.constraints import Constraint

from lvmppl.algorithms.closed_form import ClosedSite
from lvmppl.algorithms.evidence import chunks
from lvmppl.algorithms.expected import Weights, expected_log_joint
from lvmppl.algorithms.guided_step import planning_e_step
from lvmppl.algorithms.m_step import solve_closed
from lvmppl.algorithms.plan import Plan
from lvmppl.algorithms.probing import probe_rows
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.spellings import bounds, plain
from lvmppl.density import SiteView, Values
from lvmppl.exponential import read_factor

_FEW_ROWS = 16
_CLOSE = 1e-5  # of numbers that may be in single precision
RELATIVE = 1e-8  # of the gradient of Q a tenth of the way off
_ROUNDING = {torch.float64: 1.0, torch.float32: 2e4}  # by how much looser, by dtype


def not_stationary(problem: Problem, plan: Plan, values: Values) -> dict[str, str]:
    """Closed-form parameters whose gradient does not vanish after one M-step from `values`, with the reason."""
    weights, statistics = planning_e_step(problem, values, plan.sites)
    solved, floored = solve_closed(problem, plan, values, statistics, weights)
    names = [n for n in plan.closed if n not in floored]
    here = _gradients(problem, solved, weights, plan.closed)
    there = _gradients(problem, _perturbed(problem, solved, plan.closed), weights, plan.closed)
    wrong = {}
    for name in names:
        residual, scale = float(here[name].abs().max()), float(there[name].abs().max())
        limit = RELATIVE * _ROUNDING.get(solved[name].dtype, 1.0) * scale
        if not residual <= max(limit, 1e-300):
            ratio = residual / scale if scale else float("inf")
            wrong[name] = (
                f"a lookup that does not maximise Q (relative gradient {ratio:.1e} after the M-step)"
            )
    return wrong


def are_looked_up(problem: Problem, sites: Sequence[ClosedSite], values: Values) -> bool:
    """Whether the model's distributions at θ are the entries of θ that their lookups say, and in the dtype of θ.

    Both can fail after a proposal that held at the probe's values: a clamp acts only beyond its bound, and a constant in
    single precision makes a factor in single precision. Lookups do not depend on the rows: a few serve.
    """
    data, rows = probe_rows(problem, _FEW_ROWS)
    with torch.no_grad():
        views, _ = problem.model.view(data, values, rows)
        return all(_is_looked_up(views, site, values, 1e-9, same_dtype=True) for site in sites)


def misread_sites(problem: Problem, sites: Sequence[ClosedSite], values: Values) -> set[str]:
    """Sites whose distributions on some piece of the data are not what their lookups say (rows that were not probed)."""
    found: set[str] = set()
    begin = 0
    for data, rows in chunks(problem):
        here = torch.arange(begin, begin + rows.size)
        begin += rows.size
        with torch.no_grad():
            views, _ = problem.model.view(data, values, rows)
            left = [site.at_rows(here) for site in sites if site.name not in found]
            found |= {site.name for site in left if not _is_looked_up(views, site, values, _CLOSE)}
    return found


def _is_looked_up(
    views: Mapping[str, SiteView], site: ClosedSite, values: Values, rtol: float, same_dtype: bool = False
) -> bool:
    reading = read_factor(views, site.name, site.kind)
    if reading is None:
        return False
    for field, lookup in site.lookups.items():
        found, expected = reading.fields[field].tensor, lookup.evaluate(values)
        if found.shape != expected.shape or (same_dtype and found.dtype != expected.dtype):
            return False
        if not torch.allclose(found, expected.to(found.dtype), rtol=rtol, atol=0.0):
            return False
    return True


def _gradients(
    problem: Problem, values: Values, weights: Weights, names: tuple[str, ...]
) -> dict[str, Tensor]:
    leaves = {n: values[n].detach().clone().requires_grad_() for n in names}
    with torch.enable_grad():
        total = expected_log_joint(problem, {**values, **leaves}, weights)
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    grads = (torch.zeros_like(v) if g is None else g for v, g in zip(leaves.values(), found, strict=True))
    specs = problem.model.specs
    return {n: _in_coordinates(values[n], g, specs[n].constraint) for n, g in zip(names, grads, strict=True)}


def _in_coordinates(value: Tensor, grad: Tensor, constraint: Constraint) -> Tensor:
    """The gradient in unconstrained coordinates; at a boundary the part of it that points inwards."""
    constraint = plain(constraint)
    if type(constraint).__name__.lstrip("_") == "Simplex":
        inner = torch.where(value > 0, grad, 0.0)
        excess = grad - (value * inner).sum(-1, keepdim=True)
        return torch.where(value > 0, value * excess, excess.clamp_min(0))
    if constraint.event_dim == 0:
        low, high = (b.to(value) for b in bounds(constraint))
        below, above = value - low, high - value
        tiny = torch.finfo(value.dtype).tiny
        at_low, at_high = below <= tiny, above <= tiny
        factor = torch.where(low.isinf(), 1.0, below) * torch.where(high.isinf(), 1.0, above)
        inwards = torch.where(at_low, grad.clamp_min(0), torch.where(at_high, (-grad).clamp_min(0), 0.0))
        return torch.where(at_low | at_high, inwards, factor * grad)
    transform = transform_to(constraint)
    with torch.enable_grad():
        free = transform.inv(value).detach().requires_grad_()
        result: Tensor = torch.autograd.grad(transform(free), free, grad)[0]
    return result


def _perturbed(problem: Problem, values: Values, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Values a tenth of the way off, to say what a large gradient of Q is."""
    generator = torch.Generator().manual_seed(3)
    result: dict[str, Tensor] = dict(values)
    for name in names:
        value, constraint = values[name], problem.model.specs[name].constraint
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        result[name] = _moved(value, constraint, noise)
    return result


def _moved(value: Tensor, constraint: Constraint, noise: Tensor) -> Tensor:
    name = type(plain(constraint)).__name__.lstrip("_")
    if name == "Simplex":
        other = torch.softmax(noise, -1)
        return 0.9 * value + 0.1 * other
    if value.dim() >= 2 and name in (
        "PositiveDefinite",
        "PositiveSemidefinite",
        "LowerCholesky",
        "SoftplusLowerCholesky",
    ):
        mix = torch.eye(value.shape[-1], dtype=value.dtype) + 0.05 * noise.tril()
        return mix @ value if "Cholesky" in name else mix @ value @ mix.mT
    low, high = (b.to(value) for b in bounds(constraint))
    anywhere = value + 0.1 * (1 + value.abs()) * noise
    if bool(low.isinf().all()):
        return anywhere
    within = 0.9 * value + 0.1 * (low + (high - low) * torch.sigmoid(noise))
    above = value - low
    beyond = low + torch.where(above > 0, above, 1e-3 * above.mean()) * torch.exp(0.1 * noise)
    return torch.where(low.isinf(), anywhere, torch.where(high.isinf(), beyond, within))
