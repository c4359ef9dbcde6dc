"""log p(x; θ) of a problem as a function of θ, in pieces of the data that fit the cache."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms.problem import Problem
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Evaluation, Factor, Rows, Values, Variable, isolated, unvalidated
from lvmppl.errors import IntractableError
from lvmppl.exact.continuous import constant_part
from lvmppl.exact.elimination import eliminate
from lvmppl.exact.ends import check_ends
from lvmppl.exact.engine import continuous_posterior
from lvmppl.exact.evidences import of_shared
from lvmppl.exact.named import Named, align, log_sum_exp
from lvmppl.exact.scales import scale_of
from lvmppl.posteriors import DeferredPosterior, Posterior

CHUNK = 8192  # rows evaluated at once: N × K × D then stays within the cache
_FEW_ROWS = 3


def chunks(problem: Problem) -> Iterator[tuple[Values, Rows]]:
    """The data in consecutive pieces, each weighing 1 (all rows at once when a global site couples them).

    The total in a piece's `Rows` is its own size: the pieces are parts of a sum, not estimates of it.
    """
    total = problem.num_rows
    if total <= CHUNK or not is_chunkable(problem):
        yield problem.data, Rows(total)
        return
    size = math.ceil(total / math.ceil(total / CHUNK))  # equal pieces, rather than a small one at the end
    for begin in range(0, total, size):
        part = {k: v[begin : begin + size] for k, v in problem.data.items()}
        yield part, Rows(min(size, total - begin))


def is_chunkable(problem: Problem) -> bool:
    """Whether log p(x) is a sum over rows: every latent site lies in the data plate, and θ holds no per-datum table."""
    structure = problem.model.structure
    plate = structure.data_plate
    local = all(plate in s.plates for s in structure.sites.values())
    return plate is not None and local and not any(s.is_table for s in structure.parameters.values())


def log_evidence(problem: Problem, values: Values) -> Tensor:
    """Σₙ log p(x⁽ⁿ⁾; θ), plus the log-priors of parameters that have one: a scalar, differentiable in `values`."""
    total: Tensor | None = None
    for data, rows in chunks(problem):
        if problem.integrates:
            part = _integrated(problem, data, values, rows)
        else:
            evaluation = problem.model.evaluate(data, values, rows)
            part = eliminate(
                evaluation.factors, evaluation.variables, evaluation.plate_sizes, problem.data_plate
            ).total
        total = part if total is None else total + part
    assert total is not None
    return total


def _integrated(problem: Problem, data: Values, values: Values, rows: Rows) -> Tensor:
    """The same by a continuous engine, whose gradient is E_post[∇θ log p(x, z; θ)] over its points."""
    posterior = continuous_posterior(problem.model, data, values)
    table, layout = posterior.kernel.log_evidence, posterior.layout
    constant, prior = table.new_zeros(()), table.new_zeros(())
    if any(problem.data_plate not in s.plates for s in problem.model.structure.sites.values()):
        evaluation = problem.model.evaluate(data, values, rows)
        constant = constant_part(problem.model, evaluation, layout)
        prior = log_prior(problem, evaluation.factors)
    return log_sum_exp(of_shared(table, constant, layout, problem.data_plate), 0) + prior


def log_prior(problem: Problem, factors: Iterable[Factor]) -> Tensor:
    """Σ log p(θ) over the parameters that are sites of the model: a scalar."""
    sites = problem.model.structure.sites
    parts = [f.log_prob.sum() for f in factors if f.site in sites and sites[f.site].kind == "parameter"]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def exact_posterior(problem: Problem, values: Values) -> Posterior | ContinuousPosterior:
    """p(z | x; θ) over all rows, by the engine that serves the model.

    Raises:
        IntractableError: none does; names the sites in the way and what to use instead.
    """
    if problem.integrates:
        with torch.no_grad():
            return continuous_posterior(problem.model, problem.data, values)
    return _enumerated_posterior(problem, values)


def deferred_posterior(problem: Problem, values: Values) -> Posterior | ContinuousPosterior:
    """`exact_posterior` whose log evidence is known at once; data of several pieces are joined only when asked for.

    Until then its memory does not grow with the number of rows.
    """
    if problem.integrates or problem.num_rows <= CHUNK or not is_chunkable(problem):
        return exact_posterior(problem, values)
    total, plate = 0.0, problem.data_plate
    for last in _evaluations(problem, values):
        with torch.no_grad():
            done = eliminate(last.factors, last.variables, last.plate_sizes, plate)
        total += float(done.total)
    if total == -math.inf:  # whoever is impossible is to be named
        return exact_posterior(problem, values)
    dtype = torch.get_default_dtype()

    def build() -> Posterior:
        with isolated(problem.seed, dtype), unvalidated():
            return _enumerated_posterior(problem, values)

    return DeferredPosterior(build, total, _engine(last.variables))


def _evaluations(problem: Problem, values: Values) -> Iterator[Evaluation]:
    """The model on consecutive pieces of the data, without the priors of θ."""
    sites = problem.model.structure.sites
    for data, rows in chunks(problem):
        with torch.no_grad():
            of_all = rows.size == problem.model.structure.num_rows
            if problem.first is not None and values is problem.initial and of_all:
                found = problem.first
            else:
                found = problem.model.evaluate(data, values, rows)
        own = (f for f in found.factors if f.site not in sites or sites[f.site].kind != "parameter")
        yield replace(found, factors=tuple(own))


def _enumerated_posterior(problem: Problem, values: Values) -> Posterior:
    parts: list[tuple[Factor, ...]] = []
    known: list[Mapping[str, Variable]] = []
    for last in _evaluations(problem, values):
        parts.append(last.factors)
        known.append(last.variables)
    sizes = dict(last.plate_sizes)
    plate = problem.data_plate
    if plate is not None:
        sizes[plate] = problem.num_rows
    factors = join_factors(parts, plate)
    variables = join_variables(known, plate)
    return Posterior(factors, variables, sizes, plate, _engine(variables))


def _engine(variables: Mapping[str, Variable]) -> str:
    """How the sites are summed out, and why so."""
    if not variables:
        return "direct: no latent site, log p(x) is the sum of the observed log-densities"
    single = ", ".join(n for n, v in variables.items() if v.steps is None)
    chains = ", ".join(n for n, v in variables.items() if v.steps is not None)
    parts = [f"enumeration of {single} by variable elimination"] if single else []
    parts += [f"forward-backward over the Markov chain {chains}"] if chains else []
    return f"{', '.join(parts)}: every latent site is discrete with finitely many states"


def join_variables(pieces: Sequence[Mapping[str, Variable]], plate: str | None) -> dict[str, Variable]:
    """The variables of all rows from those of consecutive pieces: the lengths of chains differ by row."""
    found = dict(pieces[0])
    for name, first in pieces[0].items():
        own = [Named(v.lengths, v.lengths_dims) for v in (p[name] for p in pieces) if v.lengths is not None]
        if own:
            found[name] = replace(first, lengths=_joined(own, plate))
    return found


def join_factors(pieces: Sequence[Sequence[Factor]], plate: str | None) -> tuple[Factor, ...]:
    """The factors of all rows from those of consecutive pieces, which list them in the same order."""
    return tuple(_join(factors, plate) for factors in zip(*pieces, strict=True))


def _join(pieces: Sequence[Factor], plate: str | None) -> Factor:
    scale = pieces[0].scale
    if isinstance(scale, Tensor):
        scale = _joined([scale_of(p) for p in pieces], plate)
    return replace(
        pieces[0], log_prob=_joined([Named(p.log_prob, p.dims) for p in pieces], plate), scale=scale
    )


def _joined(pieces: Sequence[Named], plate: str | None) -> Tensor:
    """Pieces along the data plate in the axes of the first (a piece of one row has lost that of the plate)."""
    first = pieces[0]
    if plate not in first.dims or len(pieces) == 1:
        return first.tensor
    return torch.cat([align(p, first.dims) for p in pieces], first.dims.index(str(plate)))


def require_exact(problem: Problem, algorithm: str) -> None:
    """Exact algorithms need an exact posterior; tried at the start values on a few rows where these can be taken apart.

    Raises:
        IntractableError: there is none; names the sites in the way.
    """
    if not problem.integrates:
        return
    few = {k: v[:_FEW_ROWS] for k, v in problem.data.items()} if is_chunkable(problem) else problem.data
    try:
        exact_posterior(replace(problem, data=few), problem.initial)
        check_ends(problem.model, few, problem.initial, problem.free_theta)
    except IntractableError as error:
        where = f"fit '{problem.name}', algorithm {algorithm}"
        shared, fix = problem.model.structure.shared, error.fix
        if shared:
            fix += f"; {', '.join(shared)} can be fitted by MAP if the parameters of its prior are held (`freeze`)"
        raise IntractableError(where, error.expected, error.got, fix) from error
