"""The exact posterior p(z | x; θ) of enumerated sites: one frozen object that answers every question about it.

Everything derives from the log-factors of one pass of the model: marginals are derivatives of log Z, the mode is the
same elimination with max, samples, log-probabilities and entropy come from the recorded eliminations, whose reversed
order is a factorisation p(z | x) = Π p(z_v | later ones).

Shapes: N data, K states, S samples. Everything is in nats and detached.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import pandas as pd
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from lvmppl.density import Factor, Variable
from lvmppl.errors import InputError
from lvmppl.exact.chain_groups import Group, entropies
from lvmppl.exact.chains import has_chains, split
from lvmppl.exact.conditionals import conditional, gather
from lvmppl.exact.elimination import Step, eliminate
from lvmppl.exact.marginals import Marginals
from lvmppl.exact.named import Named, align
from lvmppl.exact.pieces import PIECE, pieces
from lvmppl.exact.scales import is_one, scale_of
from lvmppl.posterior_frames import probability_frame, site_frame
from lvmppl.posterior_marginals import MarginalPosterior, with_gradient
from lvmppl.posterior_states import as_index, as_support, walk


class Mode(NamedTuple):
    """The most probable joint assignment: states by site, and log p(z* | x) per datum [N] (or a scalar)."""

    states: dict[str, Tensor]
    log_prob: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Posterior(MarginalPosterior):
    """p(z | x; θ), exact. `engine` says how it was had, and why that way."""

    # ------------------------------------------------------------------------- mode, samples, log-probabilities

    @property
    def _device(self) -> torch.device:
        return self.factors[0].log_prob.device

    def mode(self) -> Mode:
        """The joint maximum a posteriori assignment z* and log p(z* | x); ties go to the lowest state.

        Where the data have probability 0 the states mean nothing, and log p(z* | x) = −∞ says so.
        """
        factors = self._of_one_copy() if self._is_scaled else self.factors
        tape: Sequence[Step] = ()
        if any(v.steps is None for v in self.variables.values()):  # chains alone have their best paths below
            tape = eliminate(factors, self.variables, self.plate_sizes, self.data_plate, maximise=True).tape
        states = self._walk(tape, 1, lambda logits: logits.argmax(0))
        for group in self._chain_groups:
            states.update(
                zip(group.names, group.given(states, self._plate_order, self.plate_sizes).mode(), strict=True)
            )
        return Mode(
            as_support(states, self.variables, self._plate_order, squeeze=True),
            self._log_prob_of(states).squeeze(0),
        )

    @property
    def _is_scaled(self) -> bool:
        return not all(is_one(scale_of(f)) for f in self.factors)

    def _of_one_copy(self) -> list[Factor]:
        """log-factors of p(z | x) itself, where a scale weighs the evidence of a plate but not the states within it."""
        result = [Factor(s.variable, conditional(s), s.clique.dims, s.plates) for s in self._elimination.tape]
        for group in self._chain_groups:
            result.extend(group.normalised(self.plate_sizes))
        return result

    def sample(self, num_samples: int, seed: int = 0) -> dict[str, Tensor]:
        """Exact joint samples, [S, *plates] by site, by backward sampling through the eliminations.

        Raises:
            InputError: the model gives probability 0 to some of the data, which then have no posterior to draw from.
        """
        if self.log_evidence == -torch.inf:
            raise InputError(
                "sample",
                "data that the model gives positive probability",
                f"probability 0 for {self._impossible}",
                "leave those rows out, or mend the zeros of the model",
            )
        generator = torch.Generator(device=self._device).manual_seed(seed)

        def draw(logits: Tensor) -> Tensor:
            weights = (logits - logits.amax(0).nan_to_num(neginf=0.0)).exp().cumsum(0)
            uniform = torch.rand(
                logits.shape[1:], generator=generator, dtype=logits.dtype, device=logits.device
            )
            return (weights <= uniform * weights[-1]).sum(0).clamp_max(logits.shape[0] - 1)

        states = self._walk(self._elimination.tape, num_samples, draw)
        for group in self._chain_groups:
            drawn = group.given(states, self._plate_order, self.plate_sizes).sample(num_samples, generator)
            states.update(zip(group.names, drawn, strict=True))
        return as_support(states, self.variables, self._plate_order, squeeze=False)

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(z | x) of values [*plates] or [S, *plates] by site (all sites): [N], or a scalar for coupled data."""
        missing = [name for name in self.variables if name not in assignment]
        if missing:
            raise InputError("log_prob", "a value for every latent site", f"none for {', '.join(missing)}")
        single = all(
            torch.as_tensor(assignment[n]).dim() <= len(v.plates) + v.support.dim() - (v.steps is None)
            for n, v in self.variables.items()
        )
        states = {
            n: as_index(torch.as_tensor(assignment[n]), v, self._plate_order, self.plate_sizes)
            for n, v in self.variables.items()
        }
        result = self._log_prob_of(states)
        return result.squeeze(0) if single else result

    def entropy(self) -> Tensor:
        """H[p(z | x)] per datum [N] (a scalar for coupled data): −Σ_v E log p(z_v | later ones); 0 for impossible data."""
        plate = self.data_plate
        if plate is None or self._is_coupled or self.plate_sizes[plate] <= PIECE:
            return self._entropy()
        parts = pieces(self.factors, self.variables, self.plate_sizes, plate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of impossible data, which all rows together have named
            return torch.cat([Posterior(tuple(f), v, s, plate, self.engine)._entropy() for f, v, s in parts])

    def _entropy(self) -> Tensor:
        factors = [with_gradient(f) for f in self.factors]
        with torch.enable_grad():
            done = eliminate(
                factors, self.variables, self.plate_sizes, self.data_plate, straight_through=True
            )
            cliques = [step.clique.tensor for step in done.tape]
            weights = torch.autograd.grad(done.total, cliques) if cliques else ()
        total: Tensor | None = None
        for step, weight in zip(done.tape, weights, strict=True):
            log_given = conditional(step).detach()
            terms = torch.where(weight > 0, -weight * log_given, 0.0)
            axes = [i for i, d in enumerate(step.clique.dims) if d in self.variables]
            local = Named(terms.sum(axes), tuple(d for d in step.clique.dims if d not in self.variables))
            part = self._per_datum(local, step.plates, already_summed=True)
            total = part if total is None else total + part
        for group in self._chain_groups:
            table = _group_entropy(group, self.variables, self.plate_sizes, self.data_plate, self._marginals)
            part = self._per_datum(table, group.plates, already_summed=True)
            total = part if total is None else total + part
        return self._zeros(()) if total is None else total

    def conditionals(self, first: Sequence[str] = ()) -> list[tuple[str, Named, frozenset[str]]]:
        """log p(z_v | x, later ones) for every site, in the order of elimination (sites in `first` go first)."""
        done = eliminate(self.factors, self.variables, self.plate_sizes, self.data_plate, first=first)
        return [
            (step.variable, Named(conditional(step), step.clique.dims), step.plates) for step in done.tape
        ]

    @cached_property
    def _plate_order(self) -> list[str]:
        return sorted({p for v in self.variables.values() for p in v.plates} | set(self._own_plates))

    @property
    def _own_plates(self) -> set[str]:
        return {p for f in self.factors for p in f.plates}

    @cached_property
    def _chain_groups(self) -> list[Group]:
        if not has_chains(self.variables):
            return []
        with torch.no_grad():
            return split(self.factors, self.variables, self.plate_sizes)[1]

    def _walk(
        self, tape: Sequence[Step], num_samples: int, choose: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        return walk(
            tape, self.variables, self._plate_order, self.plate_sizes, num_samples, choose, self._device
        )

    def _log_prob_of(self, states: Mapping[str, Tensor]) -> Tensor:
        order = self._plate_order
        total: Tensor | None = None
        for step in self._elimination.tape:
            table = gather(Named(conditional(step), step.clique.dims), step.variable, states, order)
            own = states[step.variable].unsqueeze(0)
            shape = broadcast_shape(table.shape[1:], own.shape[1:])
            value = table.expand(-1, *shape).gather(0, own.expand(1, *shape)).squeeze(0)
            value = value.expand(shape[0], *(self.plate_sizes[p] if p in step.plates else 1 for p in order))
            part = self._per_datum(Named(value, ("", *order)), step.plates)
            total = part if total is None else total + part
        for group in self._chain_groups:
            given = group.given(states, order, self.plate_sizes)
            paths = [states[n].reshape(-1, *given.shape[1:], states[n].shape[-1]) for n in group.names]
            value = given.log_prob(paths)
            plates = [p for p in order if p in group.plates]
            part = self._per_datum(Named(value, ("", *plates)), group.plates)
            total = part if total is None else total + part
        return self._zeros((1,)) if total is None else total

    def _per_datum(self, named: Named, plates: frozenset[str], already_summed: bool = False) -> Tensor:
        """Sum over plates other than the data plate; [.., N] when no global site couples the data, else [..]."""
        local = self.data_plate is not None and not self._is_coupled
        keep = [d for d in named.dims if d == "" or (local and d == self.data_plate)]
        axes = [i for i, d in enumerate(named.dims) if d not in keep]
        tensor = named.tensor.sum(axes) if axes else named.tensor
        if local and self.data_plate not in named.dims and already_summed:
            size = self.plate_sizes[self.data_plate]  # type: ignore[index]
            tensor = (tensor / size).expand(size)
        return tensor

    def _zeros(self, lead: tuple[int, ...]) -> Tensor:
        like = self.factors[0].log_prob
        local = self.data_plate is not None and not self._is_coupled
        shape = (*lead, self.plate_sizes[self.data_plate]) if local else lead  # type: ignore[index]
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    # ------------------------------------------------------------------------------------------------ tables

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state: columns site, datum, position, state, probability, mean, sd."""
        sites = list(self.variables)
        if not sites:
            return probability_frame("", torch.zeros(0), (), None)
        tables = self._marginals.tables([(s,) for s in sites])
        return pd.concat(
            [
                site_frame(self.variables[s], t, self.plate_sizes, self.data_plate)
                for s, t in zip(sites, tables, strict=True)
            ],
            ignore_index=True,
        )


def _group_entropy(
    group: Group,
    variables: Mapping[str, Variable],
    plate_sizes: Mapping[str, int],
    data_plate: str | None,
    marginals: Marginals,
) -> Named:
    """E H[sequences | other sites]: the entropies of the batch, weighted by the marginal of the other sites."""
    table = Named(entropies(group), group.batch)
    others = tuple(d for d in group.batch if d in variables)
    if others:
        (weights,) = marginals.tables([others])
        dims = (*others, *marginals.plates_of(others))
        joined = tuple(dict.fromkeys((*others, *dims, *group.batch)))
        product = align(table, joined) * align(Named(weights, dims), joined)
        table = Named(product.sum(tuple(range(len(others)))), joined[len(others) :])
    absent = [p for p in group.plates if p not in table.dims and p != data_plate]
    table = Named(table.tensor * prod(plate_sizes[p] for p in absent), table.dims)
    if data_plate in group.plates and data_plate not in table.dims:
        table = Named(table.tensor * plate_sizes[data_plate], table.dims)
    return table


class DeferredPosterior(Posterior):
    """A posterior of which the log evidence is known and the rest is built when first asked for.

    build: makes the posterior. Kept until then are the data and the parameters, and nothing of the size of both.
    """

    def __init__(self, build: Callable[[], Posterior], log_evidence: float, engine: str) -> None:
        vars(self).update(_build=build, log_evidence=log_evidence, engine=engine)

    def __getattr__(self, name: str) -> Any:  # called for what is not there yet
        known = {f.name for f in fields(Posterior)}
        if name not in known or "_build" not in vars(self):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        made = vars(self).pop("_build")()
        vars(self).update({n: getattr(made, n) for n in known})
        return vars(self)[name]

    def __reduce__(self) -> tuple[type[Posterior], tuple[Any, ...]]:
        return Posterior, tuple(getattr(self, f.name) for f in fields(Posterior))


__all__ = ["DeferredPosterior", "Mode", "Posterior"]
