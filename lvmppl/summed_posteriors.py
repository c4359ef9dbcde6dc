"""Enumerated sites that are summed out at every point of the continuous ones, asked about jointly with these.

    p(c, z | x) = p(c | z, x) p(z | x):

z is the rule's, or a point of it, and c | z is one posterior by elimination of all points of all rows together, these
being the outermost plate. Shapes: S points, N rows (1 where the data share z), d stacked dimensions, J and K states. Nats.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from lvmppl.continuous_posterior_marginals import weighted_points
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import POINTS, unvalidated
from lvmppl.exact.quadrature_posterior import QuadraturePosterior
from lvmppl.exact.summed import Evaluate, by_row, pieces_of
from lvmppl.posterior_frames import categorical_of, site_frame
from lvmppl.posteriors import Mode, Posterior


@dataclass(frozen=True, eq=False)
class SummedSites:
    """p(c | z, x) of the enumerated sites, from one pass of the model at the points z that are asked for.

    probabilities: p(c = k | x) [*plates, (T,) K] by site. plates: by site. entries: of the largest factor at one point.
    home: the data plate where rows are data.
    """

    factors: Evaluate
    probabilities: Mapping[str, Tensor]
    plates: Mapping[str, tuple[str, ...]]
    entries: int
    home: tuple[str, ...] = ()

    def given(self, z: Tensor) -> Posterior:
        """p(c | z_sn, x) at points z [S, N, d], independent of one another: `POINTS` is the data plate and the first of
        all, of S·N elements.

        Its log evidence per datum is log p(x, z_sn).
        """
        with torch.no_grad(), unvalidated():
            evaluation, factors = self.factors(z.detach())
            rows = by_row(evaluation, factors, self.home, len(z))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of points of density 0
            return Posterior(
                rows.factors, rows.variables, rows.plate_sizes, POINTS, "enumeration at every point"
            )

    def _axis(self, plates: tuple[str, ...]) -> int:
        """Where the axis of rows stands among plates; in front where the data share z."""
        return plates.index(self.home[0]) if self.home else 0

    def _apart(self, table: Tensor, points: int, plates: tuple[str, ...]) -> Tensor:
        """[S·N, *other plates, …] → [S, *plates, …]."""
        split: Tensor = table.unflatten(0, (points, -1))
        return split.movedim(1, 1 + self._axis(plates)) if self.home else split.squeeze(1)

    def _together(self, value: Tensor, plates: tuple[str, ...]) -> Tensor:
        """[S, *plates, …] → [S·N, *other plates, …]."""
        return value.movedim(1 + self._axis(plates), 1).flatten(0, 1) if self.home else value

    def log_joint(self, z: Tensor, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(x, z_sn, c_sn) [S, N] of values [S, *plates] by site at points z [S, N, d], or [*plates] at one."""
        found, begin = [], 0
        for part in pieces_of(z, self.entries):
            posterior = self.given(part)
            values = {}
            for name, value in assignment.items():
                own, variable = torch.as_tensor(value), posterior.variables[name]
                plates = self.plates[name]
                event = 1 if variable.steps is not None else variable.support.dim() - 1
                own = own if own.dim() > len(plates) + event else own.unsqueeze(0)
                values[name] = self._together(own[begin : begin + len(part)], plates)
            begin += len(part)
            total = _log_evidence(posterior) + posterior.log_prob(values)
            found.append(total.reshape(part.shape[:-1]))
        return torch.cat(found)

    def sample(self, z: Tensor, seed: int) -> dict[str, Tensor]:
        """c_s | z_s, x by site, [S, *plates], at points z [S, N, d]."""
        parts = []
        for i, part in enumerate(pieces_of(z, self.entries)):
            drawn = self.given(part).sample(1, seed + i)
            parts.append({n: self._apart(v[0], len(part), self.plates[n]) for n, v in drawn.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def continuous_given(
        self, site: str, z: Tensor, weights: Tensor, columns: list[int]
    ) -> torch.distributions.Distribution:
        """p(z | c = k, x) of some columns of z, a batch [*plates, (T,) K] of nodes z [S, N, d] of weights [S, N]."""
        plates = self.plates[site]
        tables = [
            self._apart(self.given(part).probabilities(site), len(part), plates)
            for part in pieces_of(z, self.entries)
        ]
        shares = torch.cat(tables)  # [S, *plates, (T,) K]
        logs = (self._spread(weights, shares.dim() - 1, plates) * shares).log().movedim(0, -1)
        points = self._spread(z[..., columns], shares.dim() - 1, plates).movedim(0, -2)
        return weighted_points(points.expand(*logs.shape, len(columns)), logs)

    def _spread(self, table: Tensor, axes: int, plates: tuple[str, ...]) -> Tensor:
        """[S, N, …] with its rows at their place among `axes` of the others: [S, 1, …, N, …, 1, …]."""
        shape = [1] * axes
        if axes:
            shape[self._axis(plates)] = table.shape[1]
        return table.reshape(len(table), *shape, *table.shape[2:])

    def expected(
        self, ask: Callable[[Posterior], Tensor], z: Tensor, weights: Tensor, plates: tuple[str, ...]
    ) -> Tensor:
        """Σ_s w_sn ask(c | z_sn) over nodes z [S, N, d] of weights [S, N]: [*plates, …], its values being of `plates`."""
        total: Tensor | None = None
        begin = 0
        for part in pieces_of(z, self.entries):
            values = self._apart(ask(self.given(part)), len(part), plates)
            own = self._spread(weights[begin : begin + len(part)], values.dim() - 1, plates)
            begin += len(part)
            term = torch.where(own > 0, own * values, 0.0).sum(0)
            total = term if total is None else total + term
        assert total is not None
        return total

    def mode(self, kernel: QuadraturePosterior) -> Tensor:
        """z* [N, d] of the highest max_c p(c, z | x) of each row, c* being the mode of `given`(z*).

        Sought around the highest node of every assignment that is the best of a node near the top.
        """
        heights, states = self._best(kernel.points)
        heights = heights.masked_fill(kernel.log_weights.isinf(), -torch.inf)
        return kernel.highest(lambda z: self._best(z)[0], heights, _numbered(states))[0]

    def states(self, z: Tensor) -> dict[str, Tensor]:
        """c* by site, [1, *plates], the highest max_c p(c, z | x) at z [N, d]."""
        found = self.given(z.unsqueeze(0)).mode().states
        return {n: self._apart(v, 1, self.plates[n]) for n, v in found.items()}

    def _best(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """max_c log p(x, z_sn, c) [S, N] and the states of c that reach it [S, N, …] at z [S, N, d]."""
        values, states = [], []
        for part in pieces_of(z, self.entries):
            posterior = self.given(part)
            mode = posterior.mode()
            values.append((_log_evidence(posterior) + mode.log_prob).reshape(part.shape[:-1]))
            chosen = [mode.states[n].reshape(*part.shape[:-1], -1) for n in posterior.variables]
            states.append(torch.cat(chosen, -1))
        return torch.cat(values).nan_to_num(nan=-torch.inf), torch.cat(states)


def _log_evidence(posterior: Posterior) -> Tensor:
    """log p(x, z_sn) [S·N]."""
    total = posterior.log_evidence_per_datum
    assert total is not None
    return total


def _numbered(states: Tensor) -> Tensor:
    """The assignments [Q, N, …] by number, from 0 in each row: [Q, N]."""
    _, number = torch.unique(states.flatten(0, 1), dim=0, return_inverse=True)
    ordered, index = number.view(states.shape[:2]).sort(0)
    rank = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long().cumsum(0)])
    return torch.empty_like(rank).scatter_(0, index, rank)


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
        """The highest point of p(z, c | x), and its log density: [N], or a scalar where the data share z; −∞ of a datum of
        probability 0."""
        kernel = self.kernel  # Gaussian although c is summed at every point where c does not depend on z
        z = self.summed.mode(kernel) if isinstance(kernel, QuadraturePosterior) else kernel.mean
        c = self.summed.states(z)
        values = {**c, **self._as_sites(z.unsqueeze(0), z.new_zeros(1, len(z)))}
        height = self.summed.log_joint(z.unsqueeze(0), c) - self.kernel.log_evidence.detach()
        height = height.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return Mode(
            {n: v[0] for n, v in values.items()}, height[0] if self.layout.local else height.reshape(())
        )

    def sample(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Joint samples by site, [S, *plates, *event]: z by the rule, then c given that z."""
        values = super().sample(num_samples, seed)
        return {**self.summed.sample(self._stacked(values), seed), **values}

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(z, c | x) of a value for every site, shaped as `sample` gives them, with S or without: [S?, N] (of
        data that share z [S?])."""
        lead = self._samples_of(assignment)
        own = {n: assignment[n] for n in self.layout.summed}
        joint = self.summed.log_joint(self._stacked(assignment), own) - self.kernel.log_evidence.detach()
        return joint.reshape(*lead, *joint.shape[1:]) if self.layout.local else joint.reshape(lead)

    def pair_marginal(
        self, first: str, second: str | None = None
    ) -> Tensor | torch.distributions.Distribution:
        """Of enumerated sites as `Posterior.pair_marginal`: p(j, k | x) [*plates, J, K], and of a chain. Of an enumerated
        and a continuous one p(z | c, x), a batch [*plates, (T,) K]. Else as `ContinuousPosterior.pair_marginal`.
        """
        names = (first,) if second is None else (first, second)
        enumerated = [n for n in names if n in self.layout.summed]
        if not enumerated:
            return super().pair_marginal(first, second)
        z, weights = self.kernel.nodes()
        continuous = [n for n in names if n not in self.layout.summed]
        if not continuous:
            plates = tuple(dict.fromkeys(p for n in names for p in self.variables[n].plates))
            return self.summed.expected(lambda p: p.pair_marginal(first, second), z, weights, plates)
        columns = list(self._block(continuous[0]).columns)
        return self.summed.continuous_given(enumerated[0], z, weights, columns)

    def entropy(self) -> Tensor:
        """H[z | x] + E H[c | z, x], differential in z: [N], or a scalar where the data share z."""
        z, weights = self.kernel.nodes()
        given = self.summed.expected(lambda p: p.entropy(), z, weights, self.summed.home)
        return super().entropy() + given

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state, the enumerated sites first."""
        sizes, frames = self.layout.plate_sizes, []
        for name in self.layout.summed:
            table = self.probabilities(name).movedim(-1, 0)
            frames.append(site_frame(self.variables[name], table, sizes, self.data_plate))
        return pd.concat([*frames, super().to_frame()], ignore_index=True)


__all__ = ["SummedPosterior", "SummedSites"]
