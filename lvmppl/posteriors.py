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

from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.errors import InputError
from lvmppl.exact.chain_groups import Group, entropies
from lvmppl.exact.chains import has_chains, split
from lvmppl.exact.conditionals import conditional, gather
from lvmppl.exact.elimination import Elimination, Step, eliminate
from lvmppl.exact.marginals import Marginals
from lvmppl.exact.named import Named, align, exp_
from lvmppl.exact.pieces import PIECE, pieces
from lvmppl.exact.scales import is_one, scale_of
from lvmppl.posterior_frames import categorical_of, probability_frame


class Mode(NamedTuple):
    """The most probable joint assignment: states by site, and log p(z* | x) per datum [N] (or a scalar)."""

    states: dict[str, Tensor]
    log_prob: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """p(z | x; θ), exact. `engine` says how it was had, and why that way."""

    factors: tuple[Factor, ...]
    variables: Mapping[str, Variable]
    plate_sizes: Mapping[str, int]
    data_plate: str | None
    engine: str

    def __repr__(self) -> str:
        return f"Posterior of {', '.join(self.variables) or 'no site'}: log evidence {self.log_evidence:.4f}; {self.engine}"

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(_detached(f) for f in self.factors))
        if self.log_evidence == -torch.inf:
            warnings.warn(
                f"log evidence is -inf: the model gives probability 0 to {self._impossible}", stacklevel=3
            )

    @property
    def _impossible(self) -> str:
        """What has probability 0, in words."""
        per_datum = self.log_evidence_per_datum
        if per_datum is None:
            sites = ", ".join(n for n, v in self.variables.items() if self.data_plate not in v.plates)
            return f"the data, under every state of {sites or 'its sites'}"
        rows = torch.nonzero(per_datum == -torch.inf).flatten().tolist()
        return "datum " + ", ".join(map(str, rows[:10])) + (", …" if len(rows) > 10 else "")

    # ------------------------------------------------------------------------------------------- log evidence

    @cached_property
    def _elimination(self) -> Elimination:
        if not self._chains:
            return eliminate(self.factors, self.variables, self.plate_sizes, self.data_plate)
        args = (self._leaves, self.variables, self.plate_sizes, self.data_plate)
        with torch.enable_grad():  # the way back then needs no second way forth
            return eliminate(*args, straight_through=True)

    @property
    def _chains(self) -> bool:
        return any(v.steps is not None for v in self.variables.values())

    @cached_property
    def _leaves(self) -> tuple[Factor, ...]:
        return tuple(_with_gradient(f) for f in self.factors)

    @cached_property
    def _weights(self) -> list[Named]:
        """q_s = ∂ log Z / ∂ f_s of every factor, at its own axes."""
        with torch.enable_grad():
            leaves = [f.log_prob for f in self._leaves]
            grads = torch.autograd.grad(self._elimination.total, leaves, retain_graph=True)
        return [Named(g, f.dims) for g, f in zip(grads, self._leaves, strict=True)]

    kind = "exact"
    log_evidence_error = 0.0

    @cached_property
    def log_evidence(self) -> float:
        """log p(x; θ) summed over all data."""
        return float(self._elimination.total.detach())

    @cached_property
    def log_evidence_per_datum(self) -> Tensor | None:
        """log p(x⁽ⁿ⁾; θ) [N], or None where the data are coupled by a global site."""
        done = self._elimination
        if self.data_plate is None or done.per_datum is None or self._is_coupled:
            return None
        return done.per_datum.detach()

    @property
    def _is_coupled(self) -> bool:
        return any(self.data_plate not in v.plates for v in self.variables.values())

    # --------------------------------------------------------------------------------------------- marginals

    def probabilities(self, site: str) -> Tensor:
        """p(z_site = k | x), [*plates, K] with plates outermost first; all zero for an impossible datum.

        Of a Markov chain [*plates, T, K], zero beyond a sequence's length.
        """
        self._check(site)
        table = self._last_in_its_component(site)
        if table is None:
            table = self._of_its_factor(site)
        if table is None:
            (table,) = self._marginals.tables([(site,)])
        return table.movedim(0, -1)

    def _last_in_its_component(self, site: str) -> Tensor | None:
        """The marginal as the elimination left it, for a site that no other depended on when its turn came."""
        plates = self.variables[site].plates
        for step in self._elimination.tape:
            if step.variable == site and set(step.clique.dims[1:]) <= set(plates):
                table = align(Named(conditional(step), step.clique.dims), (site, *plates))
                return exp_(table).expand(-1, *(self.plate_sizes[p] for p in plates))
        return None

    def _of_its_factor(self, chain: str) -> Tensor | None:
        """The marginal of a chain's steps as the weight of a factor that sees each of them, such as its emission."""
        variable = self.variables[chain]
        if variable.steps is None:
            return None
        dims = (chain, *variable.plates, time_axis(variable.steps))
        for index, factor in enumerate(self.factors):
            # a factor in further plates counts each of their elements
            if set(dims) <= set(factor.dims) and factor.plates == set(variable.plates):
                q = self._weights[index]
                axes = [i for i, d in enumerate(q.dims) if d not in dims]
                kept = Named(q.tensor.sum(axes) if axes else q.tensor, tuple(d for d in q.dims if d in dims))
                return align(kept, dims)
        return None

    def marginal(self, site: str) -> torch.distributions.Categorical:
        """The marginal of one site, `.probs` [*plates, K], over the indices of its support."""
        return categorical_of(self.probabilities(site))

    def pair_marginal(self, first: str, second: str | None = None) -> Tensor:
        """p(z_first = j, z_second = k | x), [*plates of both, J, K].

        Of one Markov chain: of its consecutive states (z_t = j, z_{t+1} = k), [*plates, T − 1, K, K]; of a chain and
        another site: step by step, [*plates, T, J, K].
        """
        self._check(first, *([] if second is None else [second]))
        if second is None or second == first:
            if self.variables[first].steps is None:
                raise InputError(
                    "pair_marginal",
                    "two different sites, or a Markov chain",
                    f"'{first}'",
                    "use marginal(site)",
                )
            return self._marginals.consecutive(first)
        return self._marginals.pair(first, second)

    def expected_transitions(self, chain: str) -> Tensor:
        """Expected counts of the transitions of a Markov chain, Σ p(z_t = j, z_{t+1} = k | x) over all sequences and
        steps, [K, K].
        """
        self._check(chain)
        if self.variables[chain].steps is None:
            raise InputError(
                "expected_transitions", "a Markov chain", f"'{chain}'", "use pair_marginal of two sites"
            )
        own = next((i for i, f in enumerate(self.factors) if f.site == f"{chain}·transition"), None)
        if own is None:
            return self._marginals.expected_transitions(chain)
        q = self._weights[own]
        _, before, after = chain_axes(chain, self.variables[chain].steps or 1)
        axes = [i for i, d in enumerate(q.dims) if d not in (before, after)]
        return align(
            Named(q.tensor.sum(axes) if axes else q.tensor, tuple(d for d in q.dims if d in (before, after))),
            (before, after),
        )

    @cached_property
    def _marginals(self) -> Marginals:
        return Marginals(self.factors, self.variables, self.plate_sizes)

    def _check(self, *names: str) -> None:
        for name in names:
            if name not in self.variables:
                listing = ", ".join(self.variables) or "it has none"
                raise InputError("posterior", f"one of the latent sites ({listing})", f"'{name}'")

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
        return Mode(self._as_support(states, squeeze=True), self._log_prob_of(states).squeeze(0))

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
        return self._as_support(states, squeeze=False)

    def log_prob(self, assignment: Mapping[str, Tensor]) -> Tensor:
        """log p(z | x) of values [*plates] or [S, *plates] by site (all sites): [N], or a scalar for coupled data."""
        missing = [name for name in self.variables if name not in assignment]
        if missing:
            raise InputError("log_prob", "a value for every latent site", f"none for {', '.join(missing)}")
        single = all(
            torch.as_tensor(assignment[n]).dim() <= len(v.plates) + v.support.dim() - (v.steps is None)
            for n, v in self.variables.items()
        )
        states = {n: self._as_index(n, torch.as_tensor(assignment[n])) for n in self.variables}
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
        factors = [_with_gradient(f) for f in self.factors]
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
            part = self._group_entropy(group)
            total = part if total is None else total + part
        return self._zeros(()) if total is None else total

    def _group_entropy(self, group: Group) -> Tensor:
        """E H[sequences | other sites]: the entropies of the batch, weighted by the marginal of the other sites."""
        table = Named(entropies(group), group.batch)
        others = tuple(d for d in group.batch if d in self.variables)
        if others:
            (weights,) = self._marginals.tables([others])
            dims = (*others, *self._marginals.plates_of(others))
            joined = tuple(dict.fromkeys((*others, *dims, *group.batch)))
            product = align(table, joined) * align(Named(weights, dims), joined)
            table = Named(product.sum(tuple(range(len(others)))), joined[len(others) :])
        absent = [p for p in group.plates if p not in table.dims and p != self.data_plate]
        table = Named(table.tensor * prod(self.plate_sizes[p] for p in absent), table.dims)
        if self.data_plate in group.plates and self.data_plate not in table.dims:
            table = Named(table.tensor * self.plate_sizes[self.data_plate], table.dims)
        return self._per_datum(table, group.plates, already_summed=True)

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
        """States by site, [S, *all plates (size 1 where it has none)], chosen from each conditional in reverse order."""
        order = self._plate_order
        chosen: dict[str, Tensor] = {}
        for step in reversed(tape):
            logits = gather(step.clique, step.variable, chosen, order)
            shape = [
                logits.shape[0],
                num_samples,
                *(self.plate_sizes[p] if p in step.plates else 1 for p in order),
            ]
            chosen[step.variable] = choose(logits.expand(shape))
        for name, variable in self.variables.items():  # sites with a single state never enter the tape
            if variable.steps is not None:
                continue
            shape = [num_samples, *(self.plate_sizes[p] if p in variable.plates else 1 for p in order)]
            chosen.setdefault(name, torch.zeros(shape, dtype=torch.long, device=self._device))
        return chosen

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

    def _as_support(self, states: Mapping[str, Tensor], squeeze: bool) -> dict[str, Tensor]:
        result = {}
        for name, variable in self.variables.items():
            index = states[name]
            drop = [1 + i for i, p in enumerate(self._plate_order) if p not in variable.plates]
            if variable.steps is None:  # a chain's states come with its own plates only
                index = index.squeeze(drop) if drop else index
            have = [p for p in self._plate_order if p in variable.plates]
            tail = range(1 + len(have), index.dim())  # the steps of a chain
            index = index.permute(0, *(1 + have.index(p) for p in variable.plates), *tail)
            values = index if variable.steps is not None else variable.support[index]
            result[name] = values.squeeze(0) if squeeze else values
        return result

    def _as_index(self, name: str, value: Tensor) -> Tensor:
        variable = self.variables[name]
        event = variable.support.dim() - 1 if variable.steps is None else 1
        lead = value.dim() - event - len(variable.plates)
        if lead not in (0, 1):
            raise InputError(
                f"log_prob: site '{name}'",
                f"values with axes for plates {variable.plates}, perhaps a sample axis before them",
                f"shape {tuple(value.shape)}",
            )
        value = value if lead else value.unsqueeze(0)
        wanted = [self.plate_sizes[p] for p in variable.plates] + ([variable.steps] if variable.steps else [])
        if list(value.shape[1 : 1 + len(wanted)]) != wanted:
            raise InputError(
                f"log_prob: site '{name}'",
                f"values of shape {tuple(wanted)}, perhaps with a sample axis before it",
                f"shape {tuple(value.shape[1 - lead :])}",
            )
        if variable.steps is not None:
            if bool((value < 0).any()) or bool((value >= variable.size).any()):
                raise InputError(
                    f"log_prob: site '{name}'", f"states from 0 to {variable.size - 1}", "others"
                )
            have = [p for p in self._plate_order if p in variable.plates]
            return value.long().permute(0, *(1 + variable.plates.index(p) for p in have), value.dim() - 1)
        flat = variable.support.reshape(
            variable.size, *[1] * (value.dim() - event), *variable.support.shape[1:]
        )
        match = flat == value.unsqueeze(0)
        match = match.flatten(match.dim() - event).all(-1) if event else match
        if not bool(match.any(0).all()):
            raise InputError(f"log_prob: site '{name}'", "values in its support", "a value outside it")
        index = match.to(torch.uint8).argmax(0)
        have = [p for p in self._plate_order if p in variable.plates]
        index = index.permute(0, *(1 + variable.plates.index(p) for p in have))
        for i, plate in enumerate(self._plate_order):
            if plate not in variable.plates:
                index = index.unsqueeze(1 + i)
        return index

    # ------------------------------------------------------------------------------------------------ tables

    def to_frame(self) -> pd.DataFrame:
        """A row per site, datum, position and state: columns site, datum, position, state, probability, mean, sd."""
        sites = list(self.variables)
        if not sites:
            return probability_frame("", torch.zeros(0), (), None)
        tables = self._marginals.tables([(s,) for s in sites])
        return pd.concat(
            [self._site_frame(s, t) for s, t in zip(sites, tables, strict=True)], ignore_index=True
        )

    def _site_frame(self, site: str, table: Tensor) -> pd.DataFrame:
        variable = self.variables[site]
        if variable.steps is None:
            return probability_frame(site, table.movedim(0, -1), variable.plates, self.data_plate)
        frame = probability_frame(
            site, table.movedim(0, -1), (*variable.plates, time_axis(variable.steps)), self.data_plate
        )
        if variable.lengths is None:
            return frame
        shape = [self.plate_sizes[p] for p in variable.plates]
        lengths = align(Named(variable.lengths, variable.lengths_dims), variable.plates).expand(shape)
        steps = torch.arange(variable.steps, device=lengths.device)
        inside = steps < lengths.unsqueeze(-1)  # rows beyond a length do not exist
        kept = inside.unsqueeze(-1).expand(*shape, variable.steps, variable.size)
        return frame[kept.reshape(-1).cpu().numpy()]


def _detached(factor: Factor) -> Factor:
    scale = factor.scale.detach() if isinstance(factor.scale, Tensor) else factor.scale
    return Factor(
        factor.site,
        factor.log_prob.detach(),
        factor.dims,
        factor.plates,
        scale,
        factor.scale_dims,
        factor.observed,
    )


def _with_gradient(factor: Factor) -> Factor:
    leaf = factor.log_prob.detach().requires_grad_()
    return Factor(
        factor.site, leaf, factor.dims, factor.plates, factor.scale, factor.scale_dims, factor.observed
    )


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
