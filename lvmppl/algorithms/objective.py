"""What a variational fit climbs: a bound, and the surrogate whose gradient estimates the bound's, at each step.

The draws of a step are taken at once, along an axis left of the plates, where model and guide broadcast. That is tried
out at the start against draws one at a time; where the numbers differ or the model raises, the draws are taken in a loop
and `report` says why.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.baselines import Baselines
from lvmppl.algorithms.choices import check_all_rows, choose, drawn_outside
from lvmppl.algorithms.points import objective_kind
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.reach import all_terms_outside, terms_reached, ties_rows
from lvmppl.algorithms.surrogate import Draws, Estimate, at_draws, elbo_estimate, importance_estimate, stacked
from lvmppl.density import PARTICLES, Drawing, Evaluation, Rows, Values, with_densities
from lvmppl.errors import InputError, ModelError
from lvmppl.options import VariationalOptions
from lvmppl.settings import Annealing


class Objective:
    """The objective of one fit by a guide.

    kind: of the bound. drawn: whether it is an estimate. analytic: sites with KL[q ‖ prior] in closed form. looped: why
    draws are taken one at a time, empty where they are not.
    """

    def __init__(self, problem: Problem, options: VariationalOptions) -> None:
        assert problem.guided is not None
        self.problem, self.options, self.joint = problem, options, problem.guided
        self.choices = choose(problem, options)
        self.drawn = any(c.drawn for c in self.choices)
        self.num_samples = options.num_samples
        self.particles = options.num_particles * (self.num_samples or 1) if self.drawn else 1
        weighted = f"importance_weighted_{self.num_samples}"
        self.kind = objective_kind(problem) if self.num_samples is None else weighted
        self.scores = frozenset(c.site for c in self.choices if c.estimator == "score_function")
        self.soft = frozenset(c.site for c in self.choices if c.estimator == "gumbel_softmax")
        self.hard = frozenset(c.site for c in self.choices if c.estimator == "straight_through")
        self.whole = bool(drawn_outside(problem, self.choices))
        self.reached: dict[str, frozenset[str]] = {}  # of score-function sites: terms outside of their plates
        self.baselines = Baselines({c.site: c.baseline for c in self.choices}, problem.data_plate)
        self.analytic: frozenset[str] = frozenset()
        self.looped = ""
        self.tried = not self.drawn
        self.bends = options.kl_weight != 1.0 or options.free_bits > 0

    @property
    def exact(self) -> bool:
        """Whether nothing is drawn and the gradient is that of the ELBO itself."""
        return not self.drawn and not self.bends and self.num_samples is None

    def settled(self, step: int) -> bool:
        """Whether the KL weight has come to rest, so that a fit may stop."""
        weight = self.options.kl_weight
        return not isinstance(weight, Annealing) or weight.progress(step, self.options.max_steps) >= 1

    def logged(self, step: int) -> dict[str, float]:
        """What the history says of the schedules at a step."""
        own: dict[str, float] = {}
        if isinstance(self.options.kl_weight, Annealing):
            own["kl_weight"] = self._kl_weight(step)
        for site, temperature in self._temperatures(step).items():
            own[f"temperature.{site}"] = temperature
        return own

    def report(self) -> str:
        """The estimators in words: of each site, and how the draws are taken."""
        said = []
        for choice in self.choices:
            closed = ", its KL in closed form" if choice.site in self.analytic else ""
            said.append(f"{choice}{closed}")
        if self.particles > 1:
            how = f"in a loop ({self.looped})" if self.looped else "at once"
            said.append(f"{self.particles} draws {how}")
        if self.num_samples is not None and self.whole:
            said.append("rows are tied: one weight for all of them together")
        return "; ".join(said)

    def __call__(self, values: Values, indices: Tensor | None, step: int) -> Estimate:
        """The bound of a batch, scaled to all rows, and its surrogate (the bound alone where no gradient is wanted)."""
        data, rows = self.problem.rows(indices)
        with self.joint.settled(data, values, rows):
            return self._estimate(data, values, rows, step)

    def _estimate(self, data: Values, values: Values, rows: Rows, step: int) -> Estimate:
        if not self.tried:
            self._try(data, values, rows)
        self.baselines.data = data
        drawing = self._drawing(step)
        if self.num_samples is not None:
            return self._importance(data, values, rows, drawing)
        draws = self._draws(data, values, rows, drawing)
        weights = self._weights(draws, rows, step)
        estimate = elbo_estimate(draws, self.problem.data_plate, weights, self.baselines, self.reached)
        if not self.soft:
            return estimate
        # a relaxed state is no draw of q: what is reported is the bound at states
        with torch.no_grad():
            states = replace(drawing, scores=drawing.scores | self.soft, temperatures={}, hard=frozenset())
            found = self._draws(data, values, rows, states)
            bound = elbo_estimate(found, self.problem.data_plate, {}, self.baselines).bound
        climbed = estimate.bound if estimate.climbed is None else estimate.climbed
        return Estimate(bound, estimate.surrogate, climbed)

    # ------------------------------------------------------------------------------------------------- schedules

    def _kl_weight(self, step: int) -> float:
        weight = self.options.kl_weight
        return weight.at(step, self.options.max_steps) if isinstance(weight, Annealing) else weight

    def _temperatures(self, step: int) -> dict[str, float]:
        relaxed = (c for c in self.choices if c.relaxed)
        return {c.site: c.temperature.at(step, self.options.max_steps) for c in relaxed}

    def _drawing(self, step: int) -> Drawing:
        return Drawing(
            self.particles,
            self.scores,
            self._temperatures(step),
            self.hard,
            analytic=self.analytic if self.num_samples is None else frozenset(),
        )

    def _weights(self, draws: Draws, rows: Rows, step: int) -> dict[str, float]:
        """The weight of the terms of each latent site: β, or 0 where its KL has fallen below the free bits."""
        if not self.bends:
            return {}
        structure = self.problem.model.structure
        latent = {s.name for s in structure.sites.values() if s.kind != "observed"}
        guide = {p.site for p in draws.parts if p.rank is not None} | self.analytic
        priors = {p.site for p in draws.parts if p.rank is None} & latent
        lost = [n for n in guide if n in latent and n not in priors]
        if lost:
            raise InputError(
                f"fit '{self.problem.name}': kl_weight and free_bits",
                "a prior that stands by itself",
                f"the prior of {', '.join(sorted(lost))} depends on sites that the guide leaves out",
                "give the guide every site of the prior",
            )
        beta = self._kl_weight(step)
        names = sorted(priors | guide)
        weights = dict.fromkeys(names, beta)
        if self.options.free_bits:
            groups = [names] if guide - latent else [[n] for n in names]
            for group in groups:
                if self._kl(draws, group, rows) < self.options.free_bits:
                    weights.update(dict.fromkeys(group, 0.0))
        return weights

    def _kl(self, draws: Draws, sites: list[str], rows: Rows) -> float:
        """Σ KL[q ‖ prior] of some sites, in nats a datum for sites in the data plate."""
        plate, total = self.problem.data_plate, 0.0
        for part in draws.parts:
            if part.site in sites:
                per = rows.total if plate in part.plates else 1
                total -= float(part.reduced((PARTICLES,), draws.plate_sizes).detach().mean()) / per
        return total

    # ----------------------------------------------------------------------------------------------------- draws

    def _draws(self, data: Values, values: Values, rows: Rows, drawing: Drawing) -> Draws:
        plate = self.problem.data_plate
        if not self.looped or drawing.particles == 1:
            return at_draws(self.joint.evaluate(data, values, rows, drawing), plate)
        one = replace(drawing, particles=1)
        every = range(drawing.particles)
        return stacked([at_draws(self.joint.evaluate(data, values, rows, one), plate) for _ in every])

    def _importance(self, data: Values, values: Values, rows: Rows, drawing: Drawing) -> Estimate:
        assert self.num_samples is not None
        plate = self.problem.data_plate
        paths: list[tuple[Tensor, Tensor]] = []
        # ∂ log w/∂z of a draw below a summed state carries q of the state, and its square is not what the score leaves
        mixed = any(c.estimator == "enumeration" for c in self.choices)
        if not torch.is_grad_enabled() or self.scores or mixed or not self.drawn:
            draws = self._draws(data, values, rows, drawing)
        else:
            turns = drawing.particles if self.looped else 1
            one = replace(drawing, particles=1) if self.looped else drawing
            draws = stacked(
                [at_draws(self._at_leaves(data, values, rows, one, paths), plate) for _ in range(turns)]
            )
        return importance_estimate(
            draws,
            plate,
            self.num_samples if self.drawn else 1,
            rows.scale,
            self.whole,
            self.baselines.kinds,
            self.baselines,
            paths,
        )

    def _at_leaves(
        self, data: Values, values: Values, rows: Rows, drawing: Drawing, paths: list[tuple[Tensor, Tensor]]
    ) -> Evaluation:
        """An evaluation at draws that are leaves, λ held in the log q of drawn sites; (leaf, draw) is added to `paths`."""
        drawn = self.joint.evaluate_guide(data, values, rows, drawing).samples
        leaves = {n: z.detach().requires_grad_() for n, z in drawn.items()}
        paths.extend((leaves[n], z) for n, z in drawn.items())
        held = replace(drawing, held=leaves)
        evaluation = self.joint.evaluate(data, values, rows, held)
        still = {n: v.detach() for n, v in values.items()}
        density = self.joint.evaluate_guide(data, still, rows, held)
        return with_densities(evaluation, density)

    # ------------------------------------------------------------------------------------------------- first try

    def _try(self, data: Values, values: Values, rows: Rows) -> None:
        """Whether draws can be taken at once, and which sites then have a KL in closed form; nothing random is used up."""
        self.tried = True
        particles = max(2, self.particles)
        drawing = replace(self._drawing(0), particles=particles)
        state = torch.get_rng_state()
        self._try_at_once(data, values, rows, drawing, state)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._try_reach(data, values, rows, drawing)
        finally:
            torch.set_rng_state(state)

    def _try_reach(self, data: Values, values: Values, rows: Rows, drawing: Drawing) -> None:
        """Which terms outside of a site's plates its draw reaches."""
        structure, plate = self.joint.guide_structure, self.problem.data_plate
        assert structure is not None

        def evaluate(how: Drawing) -> Evaluation:
            return self.joint.evaluate(data, values, rows, how)

        if self.num_samples is not None:
            if not self.whole and ties_rows(evaluate, drawing, plate, not self.looped):
                self.whole = True
                check_all_rows(self.problem, self.options, "a term of all rows depends on each")
            return
        single = evaluate(replace(drawing, particles=1)) if self.scores else None
        for site in sorted(self.scores):
            assert single is not None
            plates = frozenset(structure.sites[site].plates)
            if self.looped:
                self.reached[site] = all_terms_outside(at_draws(single, plate), plates)
            else:
                self.reached[site] = terms_reached(evaluate, drawing, site, plates, single.samples)

    def _try_at_once(self, data: Values, values: Values, rows: Rows, drawing: Drawing, state: Tensor) -> None:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                difference = self._difference(data, values, rows, drawing, state)
                if not difference and self.num_samples is None:
                    torch.set_rng_state(state)
                    self.analytic = self._closed_form(data, values, rows, drawing)
            self.looped = difference
        except Exception as error:  # whatever the model cannot do with several draws, it can with one
            self.looped = f"with several at once: {' '.join(str(error).split())[:200]}"
        finally:
            torch.set_rng_state(state)

    def _difference(self, data: Values, values: Values, rows: Rows, drawing: Drawing, state: Tensor) -> str:
        """What differs between draws at once and the same draws one at a time, empty if nothing does."""
        plate, joint = self.problem.data_plate, self.joint
        together = joint.evaluate(data, values, rows, drawing)
        whole = at_draws(together, plate)
        torch.set_rng_state(state)
        single = replace(drawing, particles=1)
        shapes = {n: z.shape for n, z in joint.evaluate(data, values, rows, single).samples.items()}
        for particle in (0, drawing.particles - 1):
            held = {
                n: self._of_particle(n, z, particle).reshape(shapes[n]) for n, z in together.samples.items()
            }
            torch.set_rng_state(state)
            alone = at_draws(joint.evaluate(data, values, rows, replace(single, held=held)), plate)
            left, right = _by_site(whole, plate), _by_site(alone, plate)
            for site in left:
                if not _same(left[site], right[site], particle):
                    return f"the terms of '{site or 'the model'}' differ when draws are taken at once"
        return ""

    def _of_particle(self, site: str, value: Tensor, particle: int) -> Tensor:
        structure = self.joint.guide_structure
        assert structure is not None
        axis = value.dim() + self.joint.first_available_dim - len(structure.sites[site].event_shape)
        if axis < 0 or value.shape[axis] == 1:
            return value
        return value.narrow(axis, particle, 1)

    def _closed_form(self, data: Values, values: Values, rows: Rows, drawing: Drawing) -> frozenset[str]:
        """Pathwise sites of model and guide with KL[q ‖ prior] in closed form, neither of which depends on a draw.

        With several draws at once a distribution that depends on one has their axis, whatever the numbers are.
        """
        found: set[str] = set()
        for choice in self.choices:
            if choice.estimator != "pathwise" or choice.kind == "point":
                continue
            if choice.site not in self.problem.model.structure.sites:
                continue
            try:
                trial = self.joint.evaluate(
                    data, values, rows, replace(drawing, analytic=frozenset({choice.site}))
                )
            except (NotImplementedError, ModelError):
                continue
            own = next(f for f in trial.factors if f.site == choice.site)
            summed = set(own.dims) & (set(trial.variables) - trial.guide_variables)
            if PARTICLES not in own.dims and not summed and bool(torch.isfinite(own.log_prob).all()):
                found.add(choice.site)
        return frozenset(found)


def _by_site(draws: Draws, plate: str | None) -> dict[str, Tensor]:
    """The terms of each site added up [J, B or 1]; what the model's sums leave may be cut up in one way or another."""
    found: dict[str, Tensor] = {}
    for part in draws.parts:
        own = part.plates if part.site else frozenset()
        keep = (PARTICLES,) if plate is None or plate not in own else (PARTICLES, plate)
        value = part.reduced(keep, draws.plate_sizes).reshape(
            -1, 1 if len(keep) == 1 else draws.plate_sizes[keep[1]]
        )
        found[part.site] = found[part.site] + value if part.site in found else value
    return found


def _same(several: Tensor, alone: Tensor, particle: int) -> bool:
    left = several[particle if len(several) > 1 else 0]
    close = 1e-7 if left.dtype == torch.float64 else 1e-3
    return torch.allclose(left, alone[0], rtol=close, atol=close, equal_nan=True)


__all__ = ["Objective"]
