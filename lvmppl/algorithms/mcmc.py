"""Hamiltonian Monte Carlo on the continuous latent sites, the discrete ones summed out exactly.

NUTS (Hoffman & Gelman 2014; Pyro's implementation) at fixed θ on the potential

    U(u) = −log Σ_c p(x, z(u), c; θ) − log |det ∂z/∂u|,

u ∈ ℝᵈ the unconstrained coordinates of z. The sum over the enumerated sites c is the exact engine's, so chains never see
a discrete site; what they say of one is p(c | x) = E_{z | x} p(c | z, x), averaged over draws.

Shapes: C chains, S samples; a site's *point* is its value as the model draws it, [*batch, *event] with an axis of size 1
for a plate that it skips.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import Transform, biject_to

from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.evidence import exact_posterior
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.reported import placed_plates
from lvmppl.algorithms.stepper import StepSeeds
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Evaluation, SiteInfo, Values, unvalidated
from lvmppl.errors import InputError, IntractableError, ModelError
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.evaluation import ImproperPosterior
from lvmppl.fitted import Fit, history_frame
from lvmppl.options import MCMCOptions
from lvmppl.posteriors import Posterior
from lvmppl.sampled_posterior import SampledPosterior

START_RADIUS = 2.0  # chains start uniformly within ± this in unconstrained coordinates, as Stan's do
START_TRIES = 100
AVERAGED = 200  # draws over which the conditional probabilities of discrete sites are averaged


def infer(problem: Problem, options: MCMCOptions) -> Fit:
    """Draws from p(z | x; θ) at the problem's θ, which stays as it is.

    The fit has converged when every split R̂ is at most 1.01 and no transition diverged; its message gives both, and ESS.

    Raises:
        InputError: the model has no continuous latent site, or one that has no density.
        ModelError: no point with a finite density was found to start from.
    """
    require_continuous(problem)
    started = time.perf_counter()
    with unvalidated():
        density = LogDensity(problem, problem.initial)
        chains = [_Chain(density, options, number).run() for number in range(options.chains)]
        sampled = _collect(density, chains)
    exact = _exact(problem)
    return Fit(
        algorithm=options.algorithm,
        status="converged" if sampled.trustworthy else "max_steps",
        message="; ".join(m for m in (sampled.verdict, options.unrecorded) if m),
        steps=options.warmup + options.num_samples,
        seconds=time.perf_counter() - started,
        parameters={n: problem.initial[n].detach().clone() for n in problem.theta},
        guide_parameters={},
        all_history=history_frame([row for chain in chains for row in chain.trajectory.rows]),
        log_evidence=math.nan if exact is None else exact.log_evidence,
        log_evidence_kind="none" if exact is None else exact.kind,
        log_evidence_error=math.nan if exact is None else exact.log_evidence_error,
        posterior=exact,
        sampled=sampled,
    )


def require_continuous(problem: Problem) -> None:
    """Hamiltonian Monte Carlo needs continuous latent sites, each with a density.

    Raises:
        InputError: there are none, or some are discrete without being enumerated, or are points.
    """
    where = "algorithm mcmc"
    open_sites = _open_sites(problem)
    if not open_sites:
        listing = ", ".join(problem.model.structure.enumerated)
        got = f"discrete ones only ({listing})" if listing else "none"
        fix = "use em or enumeration: their posterior is exact"
        raise InputError(where, "a model with continuous latent sites", got, fix)
    for site in open_sites:
        if site.discrete:
            fix = "mark it infer={'enumerate': 'parallel'}"
            raise InputError(where, "discrete sites that are enumerated", f"{site.name} ({site.family})", fix)
        if site.family == "Delta":
            raise InputError(
                where, "latent sites with a density", f"{site.name} (Delta)", "use pyro.deterministic"
            )


def _open_sites(problem: Problem) -> list[SiteInfo]:
    return [s for s in problem.model.structure.sites.values() if s.kind == "latent"]


def _exact(problem: Problem) -> Posterior | ContinuousPosterior | None:
    try:
        return exact_posterior(problem, problem.initial)
    except (IntractableError, ImproperPosterior, ModelError):
        return None


class LogDensity:
    """log Σ_c p(x, z, c; θ) as a function of the unconstrained coordinates u of the continuous sites.

    values: θ, constrained, held. A site's support is read at that θ.
    """

    def __init__(self, problem: Problem, values: Values) -> None:
        self.problem = problem
        self.values = {n: v.detach() for n, v in values.items()}
        self.data, self.rows = problem.rows()
        with torch.no_grad():
            views = problem.model.view(self.data, self.values, self.rows)[0]
        self.sites = _open_sites(problem)
        self.transforms: dict[str, Transform] = {
            s.name: biject_to(views[s.name].fn.support) for s in self.sites
        }
        self.shapes = {s.name: self._shape(s) for s in self.sites}
        self._check_supports()

    def _check_supports(self) -> None:
        """One change of coordinates serves a whole chain, so no support may move with the draws of other sites."""
        with torch.no_grad():
            again = self.problem.model.view(self.data, self.values, self.rows)[0]
        for name, transform in self.transforms.items():
            u = torch.zeros(self.shapes[name])
            first, second = transform(u), biject_to(again[name].fn.support)(u)
            if first.shape != second.shape or not torch.equal(first, second):
                raise InputError(
                    "algorithm mcmc",
                    "sites whose support is the same at all values of the others",
                    f"{name}, whose support moves with another latent site",
                    "draw it on a fixed support and rescale it, such as a * Uniform(0, 1)",
                )

    def _shape(self, site: SiteInfo) -> torch.Size:
        """Of u: the batch axes of the site, then what the transform makes of the event."""
        structure = self.problem.model.structure
        batch = [1] * max((-structure.plate_axes[plate] for plate in site.plates), default=0)
        for plate in site.plates:
            batch[structure.plate_axes[plate]] = structure.plates[plate]
        shape: torch.Size = self.transforms[site.name].inverse_shape(torch.Size([*batch, *site.event_shape]))
        return shape

    def points(self, u: Values) -> dict[str, Tensor]:
        """z(u) by site."""
        return {name: transform(u[name]) for name, transform in self.transforms.items()}

    def log_joint(self, points: Values) -> Tensor:
        """log Σ_c p(x, z, c; θ), a scalar, in nats."""
        evaluation = self._evaluate(points)
        plate = self.problem.data_plate
        return eliminate(evaluation.factors, evaluation.variables, evaluation.plate_sizes, plate).total

    def _evaluate(self, points: Values) -> Evaluation:
        return self.problem.model.held(points).evaluate(self.data, self.values, self.rows)

    def conditional(self, points: Values) -> Posterior:
        """p(c | z, x; θ) of the enumerated sites, exact."""
        found = self._evaluate(points)
        plate = self.problem.data_plate
        return Posterior(
            found.factors, found.variables, found.plate_sizes, plate, "given the continuous sites"
        )

    def potential(self, u: Values) -> Tensor:
        """U(u); NaN, which ends a trajectory as divergent, where the model itself cannot be evaluated."""
        points = self.points(u)
        try:
            total = self.log_joint(points)
        except ModelError as error:
            if isinstance(error.__cause__, (ValueError, RuntimeError)):
                return math.nan * torch.stack([part.sum() for part in u.values()]).sum()
            raise
        for name, transform in self.transforms.items():
            total = total + transform.log_abs_det_jacobian(u[name], points[name]).sum()
        return -total

    def start(self) -> dict[str, Tensor]:
        """A point of finite density and gradient, uniform within ±2 in unconstrained coordinates.

        Raises:
            ModelError: none was found.
        """
        for _ in range(START_TRIES):
            u = {
                n: torch.empty(shape).uniform_(-START_RADIUS, START_RADIUS)
                for n, shape in self.shapes.items()
            }
            leaves = {name: part.clone().requires_grad_() for name, part in u.items()}
            value = self.potential(leaves)
            if not math.isfinite(float(value.detach())):
                continue
            gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            if all(g is None or bool(torch.isfinite(g).all()) for g in gradients):
                return u
        raise ModelError(
            "algorithm mcmc",
            "a point of finite log density to start from",
            f"none in {START_TRIES} draws within ±{START_RADIUS:g} of unconstrained coordinates",
            "check the model's supports and scales at the parameters that the fit holds",
        )


@dataclass
class _Chain:
    """One chain: where it starts, what it logs, what it drew."""

    density: LogDensity
    options: MCMCOptions
    number: int

    def run(self) -> _Chain:
        problem, options = self.density.problem, self.options
        self.seeds = StepSeeds(problem, self.number)
        self.trajectory = Trajectory(self.number, "log_joint")
        self.step, self.divergences = 0, 0
        total = options.warmup + options.num_samples
        problem.progress.start(problem.name, self.number, total)
        self.seeds.use(0)
        start = self.density.start()
        self._log(start)
        self.seeds.use(1)
        kernel = NUTS(potential_fn=self.density.potential)
        settings: dict[str, Any] = {"warmup_steps": options.warmup, "disable_progbar": True}
        settings.update(initial_params=start, hook_fn=self._after_step)
        sampler = MCMC(kernel, options.num_samples, **settings)
        sampler.run()
        with torch.no_grad():
            self.points = self.density.points(sampler.get_samples())  # [S, *batch, *event]
        problem.progress.finish("max_steps")
        return self

    def _after_step(self, kernel: NUTS, u: Values, stage: str, index: int) -> None:
        self.step += 1
        if self.step > self.options.warmup:
            self.divergences = len(kernel.diagnostics()["divergences"])
        self._log(u, step_size=float(kernel.step_size))
        self.seeds.use(self.step + 1)

    def _log(self, u: Values, **extra: float) -> None:
        with torch.no_grad():
            value = float(self.density.log_joint(self.density.points(u)))
        self.trajectory.record(self.step, value, **extra)
        self.density.problem.progress.update(self.step, value)


def _collect(density: LogDensity, chains: Sequence[_Chain]) -> SampledPosterior:
    """The draws of all chains by site, and the discrete sites' probabilities given them."""
    points = {
        n: torch.stack([c.points[n] for c in chains]) for n in density.transforms
    }  # [C, S, *batch, *event]
    structure = density.problem.model.structure
    plates = {s.name: placed_plates(density.problem, s.name) for s in density.sites}
    draws = {
        s.name: _as_plates(points[s.name], s, plates[s.name], structure.plate_axes) for s in density.sites
    }
    probabilities: dict[str, Tensor] = {}
    if structure.enumerated:
        probabilities = _averaged(density, {n: p.flatten(0, 1) for n, p in points.items()})
        plates.update({n: structure.sites[n].plates for n in probabilities})
    return SampledPosterior(
        draws, probabilities, plates, structure.data_plate, sum(c.divergences for c in chains)
    )


def _as_plates(point: Tensor, site: SiteInfo, plates: Sequence[str], axes: Mapping[str, int]) -> Tensor:
    """[C, S, *batch, *event] to [C, S, *plates, *event]."""
    first = point.dim() - len(site.event_shape)
    kept = [first + axes[plate] for plate in plates]
    others = [axis for axis in range(2, first) if axis not in kept]  # of size 1
    moved = point.permute(0, 1, *kept, *range(first, point.dim()), *others)
    return moved.reshape(moved.shape[: moved.dim() - len(others)])


def _averaged(density: LogDensity, points: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E_{z | x} p(c = k | z, x) of each enumerated site, [*plates, K], over evenly spaced draws."""
    count = len(next(iter(points.values())))
    chosen = torch.linspace(0, count - 1, min(count, AVERAGED)).round().long()
    totals: dict[str, Tensor] = {}
    for index in chosen.tolist():
        with torch.no_grad():
            given = density.conditional({n: p[index] for n, p in points.items()})
        for name in given.variables:
            part = given.probabilities(name)
            totals[name] = totals[name] + part if name in totals else part
    return {name: total / len(chosen) for name, total in totals.items()}


def add_reference(problem: Problem, fit: Fit, options: MCMCOptions) -> Fit:
    """The fit with draws from the posterior at its own θ; what the chains say of themselves joins its message."""
    held = {**problem.initial, **fit.parameters}
    chains = infer(replace(problem, name="reference", guided=None, initial=held), options)
    assert chains.sampled is not None
    return with_draws(fit, chains.sampled)


def with_draws(fit: Fit, sampled: SampledPosterior) -> Fit:
    """The fit with these draws from the posterior at its θ."""
    return replace(fit, sampled=sampled, message=joined(fit.message, f"reference: {sampled.verdict}"))


def joined(*sentences: str) -> str:
    """The sentences of a message that are not empty."""
    return "; ".join(s for s in sentences if s)


__all__ = ["LogDensity", "add_reference", "infer", "joined", "require_continuous", "with_draws"]
