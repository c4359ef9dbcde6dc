"""Latent Markov chains within a model: each chain is summed out as one variable, by forward-backward.

A chain z of T steps comes as an initial factor over `z`, a transition factor over its (before, after) axes, and factors
of what depends on it step by step, over `z` and the axis of steps. `sum_out` replaces all of them by one factor
log Σ_z over whatever other sites and plates they hold, differentiable in each, so that marginals and expected counts are
gradients as everywhere else. Chains that meet in one factor (factorial) are summed out together, one axis at a time:
O(T · L · K^(L+1)) for L chains, not O(T · K^(2L)).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.errors import IntractableError, ModelError
from lvmppl.exact.chain_groups import Group, build_group


def has_chains(variables: Mapping[str, Variable]) -> bool:
    return any(v.steps is not None for v in variables.values())


def sum_out(
    factors: Sequence[Factor],
    variables: Mapping[str, Variable],
    plate_sizes: Mapping[str, int],
    maximise: bool = False,
) -> tuple[list[Factor], dict[str, Variable]]:
    """The factors with every chain summed (or maximised) out, and the variables that are left."""
    rest, groups = split(factors, variables, plate_sizes)
    for group in groups:
        value = group.maximum() if maximise else group.log_partition()
        tensor = value.reshape(group.sizes)
        keep = [i for i, s in enumerate(group.sizes) if s != 1]
        dims = tuple(group.batch[i] for i in keep)
        named = tensor.reshape([group.sizes[i] for i in keep])
        rest.append(replace(group.template, log_prob=named, dims=dims, plates=group.plates, observed=False))
    return rest, {n: v for n, v in variables.items() if v.steps is None}


def split(
    factors: Sequence[Factor], variables: Mapping[str, Variable], plate_sizes: Mapping[str, int]
) -> tuple[list[Factor], list[Group]]:
    """(factors without chains, groups of chains that meet)."""
    chains = {n: v for n, v in variables.items() if v.steps is not None}
    owner = {axis: n for n, v in chains.items() for axis in chain_axes(n, v.steps or 0)[1:]} | {
        n: n for n in chains
    }
    touching = [{owner[d] for d in f.dims if d in owner} for f in factors]
    for f, names in zip(factors, touching, strict=True):
        own = f.site.removesuffix("·transition")
        if own in chains:
            _check_alone(own, names)
        if (
            names
            and own not in chains
            and not any(d == time_axis(chains[n].steps or 0) for n in names for d in f.dims)
        ):
            raise ModelError(
                f"site '{f.site}'",
                f"to depend on the chain {', '.join(sorted(names))} step by step, its steps the first event axis",
                "one log-probability for a whole sequence",
                "index with the states (table[z]) and declare the steps with .to_event(1)",
            )
    rest = [
        f
        for f, names in zip(factors, touching, strict=True)
        if not names and f.site not in chains and f.site.removesuffix("·transition") not in chains
    ]
    groups: list[set[str]] = []
    for names in [*touching, *({n} for n in chains)]:
        if names:
            joined = [g for g in groups if g & names]
            groups = [g for g in groups if not g & names] + [names.union(*joined)]
    built = [
        build_group(tuple(n for n in chains if n in g), factors, variables, plate_sizes, owner)
        for g in groups
    ]
    return rest, built


def _check_alone(chain: str, touched: set[str]) -> None:
    """The initial and the transition factor of a chain hold no other: its table would change with the other's states."""
    others = sorted(touched - {chain})
    if others:
        raise IntractableError(
            f"chain '{chain}'",
            "initial and transition weights that depend on no other chain",
            f"a dependence on {', '.join(others)}",
            "write a single chain over the product of their states, or a pyro.markov loop",
        )
