"""The reported ELBO, q over its enumerated sites, and mean and sd of the sites that q draws.

Where sites are drawn, averages over independent draws of the guide. Many rows are taken in pieces, whose memory does not
grow with N; each piece is drawn on its own, so the sum over pieces is a draw of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvmppl.algorithms.evidence import CHUNK, join_factors, join_variables
from lvmppl.algorithms.points import point_sites
from lvmppl.algorithms.problem import Problem
from lvmppl.algorithms.stepper import StepSeeds, draws
from lvmppl.density import Evaluation, Rows, Values
from lvmppl.elbo import MOVES, GuideWeights, elbo, expectation
from lvmppl.exact.named import Named, align
from lvmppl.posteriors import Posterior

ELBO_DRAWS = 200  # draws of the guide, where sites are drawn
MIN_DRAWS = 50  # of very many rows, whose sum varies relatively little
ROW_DRAWS = 50_000_000  # draws times rows above which there are fewer draws


@dataclass(frozen=True)
class ReportedBound:
    """elbo, error: of the sum over rows, in nats, and its standard error (0 where nothing is drawn).
    Both NaN, and per_datum None, where q holds a continuous site at a point: there is no bound then.

    moments: by drawn site of the model [2, *plates, *event], mean and sd under q, the data plate first.
    """

    elbo: float
    error: float
    per_datum: Tensor | None
    variational: Posterior | None
    moments: Mapping[str, Tensor]


def reported_bound(problem: Problem, values: Values) -> ReportedBound:
    """The bound at θ and λ over all rows."""
    count = 1
    if draws(problem):
        count = max(MIN_DRAWS, min(ELBO_DRAWS, ROW_DRAWS // problem.num_rows))
    seeds = StepSeeds(problem, -1)
    pieces = []
    with torch.no_grad():
        for i, (data, rows) in enumerate(_pieces(problem)):
            pieces.append(_Piece(problem))
            for draw in range(count):
                seeds.use(i * count + draw)
                assert problem.guided is not None
                pieces[-1].add(problem.guided.evaluate(data, values, rows))
    totals = [math.fsum(own) for own in zip(pieces[0].constants, *(p.totals for p in pieces), strict=True)]
    mean = math.fsum(totals) / count
    spread = math.fsum((t - mean) ** 2 for t in totals)
    error = math.sqrt(spread / (count - 1) / count) if count > 1 else 0.0
    per_datum = None if pieces[0].per_datum is None else torch.cat([p.mean_per_datum() for p in pieces])
    if point_sites(problem):
        mean, error, per_datum = math.nan, math.nan, None
    return ReportedBound(mean, error, per_datum, _variational(problem, pieces), _moments(problem, pieces))


def _pieces(problem: Problem) -> Iterator[tuple[Values, Rows]]:
    """Consecutive pieces of the data, each weighing 1; all rows at once where the ELBO is no sum over rows."""
    total = problem.num_rows
    if total <= CHUNK or not is_separable(problem):
        yield problem.rows()
        return
    for indices in torch.arange(total).split(CHUNK):
        begin, end = int(indices[0]), int(indices[-1]) + 1
        yield {k: v[begin:end] for k, v in problem.data.items()}, Rows(len(indices), indices)


def is_separable(problem: Problem) -> bool:
    """Whether the ELBO is a constant plus a sum over rows: what is observed or enumerated stands in the data plate."""
    plate = problem.data_plate
    sites = problem.model.structure.sites.values()
    return plate is not None and all(plate in s.plates for s in sites if s.kind in ("observed", "enumerated"))


class _Piece:
    """What the draws of one piece add up to."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.constants: list[float] = []  # of each draw, the part of the ELBO outside the data plate
        self.totals: list[float] = []  # of each draw, the sum over the piece's rows
        self.per_datum: Tensor | None = None
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.last: Evaluation | None = None
        self.dtype = torch.float64  # of the moments handed out

    def add(self, evaluation: Evaluation) -> None:
        """Count one draw."""
        bound = elbo(evaluation, self.problem.data_plate)
        self.constants.append(float(bound.constant))
        self.totals.append(0.0 if bound.per_datum is None else float(bound.per_datum.sum()))
        if bound.per_datum is not None:
            self.per_datum = bound.per_datum if self.per_datum is None else self.per_datum + bound.per_datum
        for name in (*evaluation.samples, *evaluation.moments):
            if name in self.problem.model.structure.sites:
                self.dtype = evaluation.guide_factors[0].log_prob.dtype
                first, second = _powers(self.problem, evaluation, name)
                self.first[name] = self.first[name] + first if name in self.first else first
                self.second[name] = self.second[name] + second if name in self.second else second
        self.last = evaluation

    def mean_per_datum(self) -> Tensor:
        assert self.per_datum is not None
        return self.per_datum / len(self.totals)

    def moments(self, name: str) -> Tensor:
        """Mean and sd of a site over this piece's draws, [2, *plates, *event]."""
        centre = self.first[name] / len(self.totals)
        spread = (self.second[name] / len(self.totals) - centre.square()).clamp_min(0).sqrt()
        return torch.stack([centre, spread]).to(self.dtype)


def _powers(problem: Problem, evaluation: Evaluation, name: str) -> tuple[Tensor, Tensor]:
    """E z and E z² of a drawn or integrated site under q's enumerated sites at the draw, each [*plates, *event]."""
    axes = evaluation.sample_axes[name]
    if name in evaluation.moments:
        value, square = evaluation.moments[name]
    else:
        value = evaluation.samples[name].double()  # E z² − (E z)² loses the digits that single precision has
        square = value.square()
    site = problem.model.structure.sites[name]
    events = tuple(f"·event{i}" for i in range(len(site.event_shape)))
    batch = value.shape[: value.dim() - len(events)]
    kept = [i for i, size in enumerate(batch) if size > 1]
    shape = [batch[i] for i in kept] + list(site.event_shape)
    dims = (*(axes[i - len(batch)] for i in kept), *events)
    plates = placed_plates(problem, name)
    sizes = [*(evaluation.plate_sizes[p] for p in plates), *site.event_shape]
    weights = GuideWeights(evaluation.guide_factors, evaluation.variables, evaluation.guide_variables)
    found = []
    for power in (value, square):
        mean = expectation(Named(power.reshape(shape), dims), weights, evaluation.plate_sizes)
        found.append(align(mean, (*plates, *events)).expand(sizes))
    return found[0], found[1]


def placed_plates(problem: Problem, name: str) -> tuple[str, ...]:
    """The plates of a site of the model: the data plate, then the others from left to right."""
    structure = problem.model.structure
    own = structure.sites[name].plates
    return tuple(sorted(own, key=lambda p: (p != structure.data_plate, structure.plate_axes[p])))


def _moments(problem: Problem, pieces: Sequence[_Piece]) -> dict[str, Tensor]:
    """Mean and sd of every drawn site; of a global one by the draws of the first piece."""
    found = {}
    for name in pieces[0].first:
        local = problem.data_plate in problem.model.structure.sites[name].plates
        parts = pieces if local else pieces[:1]
        found[name] = torch.cat([p.moments(name) for p in parts], 1) if local else parts[0].moments(name)
    return found


def _variational(problem: Problem, pieces: Sequence[_Piece]) -> Posterior | None:
    """q over its enumerated sites (at the last draw of those above them)."""
    evaluations = [p.last for p in pieces if p.last is not None]
    first = evaluations[0]
    names, plate, sizes = first.guide_variables, problem.data_plate, dict(first.plate_sizes)
    if not names:
        return None
    if plate is not None:
        sizes[plate] = problem.num_rows
    own = [[f for f in e.guide_factors if f.site.removesuffix(MOVES) in names] for e in evaluations]
    known = join_variables([e.variables for e in evaluations], plate)
    variables = {n: v for n, v in known.items() if n in names}
    factors = join_factors(own, plate)
    return Posterior(factors, variables, sizes, plate, "the guide")


__all__ = ["ELBO_DRAWS", "ReportedBound", "is_separable", "reported_bound"]
