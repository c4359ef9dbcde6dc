"""Log evidence and marginals of enumerated sites: log Z of the log-factors of one pass of the model, and its derivatives.

Shapes: N data, K states. Everything is in nats and detached.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.errors import InputError
from lvmppl.exact.conditionals import conditional
from lvmppl.exact.elimination import Elimination, eliminate
from lvmppl.exact.marginals import Marginals
from lvmppl.exact.named import Named, align, exp_
from lvmppl.posterior_frames import categorical_of


@dataclass(frozen=True, eq=False, repr=False)
class MarginalPosterior:
    """What the marginals of p(z | x; θ) tell; `Posterior` adds what is asked of all sites jointly."""

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
        return tuple(with_gradient(f) for f in self.factors)

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


def with_gradient(factor: Factor) -> Factor:
    leaf = factor.log_prob.detach().requires_grad_()
    return Factor(
        factor.site, leaf, factor.dims, factor.plates, factor.scale, factor.scale_dims, factor.observed
    )


__all__ = ["MarginalPosterior", "with_gradient"]
