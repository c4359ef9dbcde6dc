"""Enumerated sites that are summed out at every point of the continuous ones, asked about jointly with these.

    p(c, z | x) = p(c | z, x) p(z | x):

z is the rule's, or a point of it, and c | z is one posterior by elimination of all points together, these being the
outermost plate. Shapes: S points, d stacked dimensions, J and K states. Nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import POINTS, Evaluation, Factor, time_axis, unvalidated
from lvmppl.exact.quadrature_posterior import QuadraturePosterior
from lvmppl.exact.summed import pieces_of
from lvmppl.posterior_frames import categorical_of, probability_frame
from lvmppl.posteriors import Mode, Posterior

Factors = Callable[[Tensor], tuple[Evaluation, list[Factor]]]
"""z [S, 1, d] → one pass of the model there, and those of its log-factors that belong to the joint density."""


@dataclass(frozen=True, eq=False)
class SummedSites:
    """p(c | z, x) of the enumerated sites, from one pass of the model at the points z that are asked for.

    probabilities: p(c = k | x) [*plates, (T,) K] by site. entries: of the largest factor at one point.
    """

    factors: Factors
    probabilities: Mapping[str, Tensor]
    entries: int

    def given(self, z: Tensor) -> Posterior:
        """p(c | z_s, x) at points z [S, 1, d], independent of one another: `POINTS` is the data plate and the first of all.

        Its log evidence per datum is log p(x, z_s).
        """
        with torch.no_grad(), unvalidated():
            evaluation, factors = self.factors(z.detach())
        own = tuple(replace(f, plates=f.plates | {POINTS}) for f in factors)
        variables = {n: replace(v, plates=(POINTS, *v.plates)) for n, v in evaluation.variables.items()}
        sizes = {**evaluation.plate_sizes, POINTS: len(z)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of points of density 0
            return Posterior(own, variables, sizes, POINTS, "enumeration at every point")

    def log_joint(self, z: Tensor, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z_s, c_s) [S] of values [S, *plates] by site at points z [S, 1, d], or [*plates] at one."""
        found, begin = [], 0
        for part in pieces_of(z, self.entries):
            posterior = self.given(part)
            values = {}
            for name, value in assignment.items():
                own = torch.as_tensor(value)
                plates = (
                    len(posterior.variables[name].plates) - 1 + (posterior.variables[name].steps is not None)
                )
                own = own if own.dim() > plates else own.unsqueeze(0)
                values[name] = own[begin : begin + len(part)]
            begin += len(part)
            total = posterior.log_evidence_per_datum
            assert total is not None
            found.append(total + posterior.log_prob(values))
        return torch.cat(found)

    def sample(self, z: Tensor, seed: int) -> dict[str, Tensor]:
        """c_s | z_s, x by site, [S, *plates], at points z [S, 1, d]."""
        parts = [self.given(part).sample(1, seed + i) for i, part in enumerate(pieces_of(z, self.entries))]
        return {name: torch.cat([part[name][0] for part in parts]) for name in parts[0]}

    def continuous_given(
        self, site: str, z: Tensor, weights: Tensor, columns: list[int]
    ) -> torch.distributions.Distribution:
        """p(z | c = k, x) of some columns of z, a batch [*plates, (T,) K] of weighted nodes."""
        from pyro.distributions import Empirical

        tables = [self.given(part).probabilities(site) for part in pieces_of(z, self.entries)]
        shares = torch.cat(tables).movedim(0, -1)  # [*plates, (T,) K, S]
        points = z[:, 0, columns].expand(*shares.shape, len(columns))
        found: torch.distributions.Distribution = Empirical(points, (weights * shares).log())
        return found

    def expected(self, ask: Callable[[Posterior], Tensor], z: Tensor, weights: Tensor) -> Tensor:
        """Σ_s w_s ask(c | z_s) over nodes z [S, 1, d] of weights [S]."""
        total: Tensor | None = None
        begin = 0
        for part in pieces_of(z, self.entries):
            values = ask(self.given(part))
            own = weights[begin : begin + len(part)].view(-1, *[1] * (values.dim() - 1))
            begin += len(part)
            term = torch.where(own > 0, own * values, 0.0).sum(0)
            total = term if total is None else total + term
        assert total is not None
        return total

    def mode(self, kernel: QuadraturePosterior) -> tuple[Tensor, Tensor]:
        """z* [1, d] of the highest max_c p(c, z | x), and log p(x, z*, c*) [1], c* being the mode of `given`(z*).

        Sought around the highest node of every assignment that is the best of a node near the top.
        """
        nodes = kernel.points  # [Q, 1, d]
        states: list[Tensor] = []

        def highest(z: Tensor) -> Tensor:
            values = []
            for part in pieces_of(z, self.entries):
                posterior = self.given(part)
                mode = posterior.mode()
                total = posterior.log_evidence_per_datum
                assert total is not None
                values.append(total + mode.log_prob)
                states.append(
                    torch.cat([mode.states[n].reshape(len(part), -1) for n in posterior.variables], -1)
                )
            return torch.cat(values).nan_to_num(nan=-torch.inf).unsqueeze(-1)

        heights = highest(nodes)
        _, groups = torch.unique(torch.cat(states), dim=0, return_inverse=True)
        heights = heights.masked_fill(kernel.log_weights.isinf(), -torch.inf)
        return kernel.highest(highest, heights, groups.unsqueeze(-1))


@dataclass(frozen=True, eq=False, repr=False)
class SummedPosterior(ContinuousPosterior):
    """`ContinuousPosterior` of models with enumerated sites that are summed out at every point of the continuous ones.

    Questions that reach the enumerated sites run the model once at the nodes or points concerned, the mode three times.
    """

    summed: SummedSites = field(kw_only=True)

    def probabilities(self, site: str) -> Tensor:
        """p(c = k | x) [*plates, (T,) K]."""
        return self.summed.probabilities[site] if site in self.layout.summed else super().probabilities(site)

    def marginal(self, site: str) -> torch.distributions.Distribution:
        """Categorical (`.probs` [*plates, (T,) K]) of an enumerated site; else as `ContinuousPosterior.marginal`."""
        if site in self.layout.summed:
            return categorical_of(self.probabilities(site))
        return super().marginal(site)

    def mode(self) -> Mode:
        """The highest point of p(z, c | x), and its log density (a scalar)."""
        if isinstance(self.kernel, QuadraturePosterior):
            z, _ = self.summed.mode(self.kernel)
        else:  # Gaussian although c is summed at every point: c does not depend on z
            z = self.kernel.mean
        posterior = self.summed.given(z.unsqueeze(0))
        mode = posterior.mode()
        assert posterior.log_evidence_per_datum is not None
        height = posterior.log_evidence_per_datum + mode.log_prob - self.kernel.log_evidence.detach()
        values = {**mode.states, **self._as_sites(z.unsqueeze(0), z.new_zeros(1, 1))}
        return Mode({n: v[0] for n, v in values.items()}, height.reshape(()))

    def sample(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Joint samples by site, [S, *plates, *event]: z by the rule, then c given that z."""
        values = super().sample(num_samples, seed)
        return {**self.summed.sample(self._stacked(values), seed), **values}

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(z, c | x) of a value for every site, shaped as `sample` gives them, with S or without: [S?]."""
        lead = self._samples_of(assignment)
        own = {n: assignment[n] for n in self.layout.summed}
        joint = self.summed.log_joint(self._stacked(assignment), own)
        return (joint - self.kernel.log_evidence.detach()).reshape(lead)

    def pair_marginal(
        self, first: str, second: str | None = None
    ) -> Tensor | torch.distributions.Distribution:
        """Of enumerated sites as `Posterior.pair_marginal`: p(j, k | x) [*plates, J, K], and of a chain. Of an enumerated
        and a continuous one p(z | c, x), a batch [*plates, (T,) K]. Else as `ContinuousPosterior.pair_marginal`.
        """
        enumerated = [n for n in (first, second) if n in self.layout.summed]
        if not enumerated:
            return super().pair_marginal(first, second)
        z, weights = self.kernel.nodes()
        continuous = [n for n in (first, second) if n is not None and n not in self.layout.summed]
        if not continuous:
            return self.summed.expected(lambda p: p.pair_marginal(first, second), z, weights.flatten())
        columns = list(self._block(continuous[0]).columns)
        return self.summed.continuous_given(enumerated[0], z, weights.flatten(), columns)

    def entropy(self) -> Tensor:
        """H[z | x] + E H[c | z, x], differential in z: a scalar."""
        z, weights = self.kernel.nodes()
        return super().entropy() + self.summed.expected(lambda p: p.entropy(), z, weights.flatten())

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state, the enumerated sites first."""
        frames = []
        for name in self.layout.summed:
            variable = self.variables[name]
            steps = () if variable.steps is None else (time_axis(variable.steps),)
            plates = (*variable.plates, *steps)
            frames.append(probability_frame(name, self.probabilities(name), plates, self.data_plate))
        return pd.concat([*frames, super().to_frame()], ignore_index=True)


__all__ = ["SummedPosterior", "SummedSites"]
