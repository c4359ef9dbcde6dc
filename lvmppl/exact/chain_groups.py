"""Markov chains that meet, and their tensors over a common batch: what `chains` sums out at once.

Shapes: B batch (other sites and plates, flattened), T steps, K states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from lvmppl.density import Factor, Variable, chain_axes, time_axis
from lvmppl.errors import IntractableError
from lvmppl.exact import chain as kernel
from lvmppl.exact.named import Named, align, log_sum_exp, union
from lvmppl.exact.scales import common_scale, ratio, scale_of, times

MAX_JOINT_STATES = 2**14  # Kᴸ of coupled chains


@dataclass(frozen=True)
class Group:
    """Chains summed out together, and their tensors over a common batch.

    names: the chains, in the order of their state axes. batch: the other axes (sites, then plates) with their sizes.
    initial, transition: one a chain, [B|1, K] and [B|1, T−1|1, K, K]. emission: [B, T, K₁, …, K_L].
    """

    names: tuple[str, ...]
    batch: tuple[str, ...]
    sizes: tuple[int, ...]
    plates: frozenset[str]
    initial: tuple[Tensor, ...]
    transition: tuple[Tensor, ...]
    emission: Tensor
    lengths: Tensor | None
    factors: tuple[Factor, ...]  # what it was built from; the first is an initial factor

    @property
    def template(self) -> Factor:
        return self.factors[0]

    @property
    def joint_sizes(self) -> tuple[int, ...]:
        return tuple(self.emission.shape[2:])

    def as_one(self) -> tuple[Tensor, Tensor, Tensor]:
        """The group as a single chain over the product of its states: (initial, transition, emission)."""
        initial, transition = self.initial[0], self.transition[0]
        for a, A in zip(self.initial[1:], self.transition[1:], strict=True):
            initial = (initial.unsqueeze(-1) + a.unsqueeze(-2)).flatten(-2)
            joined = transition[..., :, None, :, None] + A[..., None, :, None, :]
            transition = joined.flatten(-2).flatten(-3, -2)
        return initial, transition, self.emission.flatten(2)

    def log_partition(self) -> Tensor:
        """log Σ over all sequences of the group, [B]."""
        if len(self.names) == 1:
            return kernel.log_partition(self.initial[0], self.transition[0], self.emission, self.lengths)
        return _factorial_log_partition(self)

    def normalised(self, plate_sizes: Mapping[str, int]) -> list[Factor]:
        """log-factors of p(sequences | x, other sites): one copy's, without a scale."""
        value = self.log_partition()
        constant = torch.where(torch.isfinite(value), -value, 0.0)
        norm = replace(
            self.template,
            site="",
            log_prob=constant.reshape(self.sizes),
            dims=self.batch,
            plates=self.plates,
            scale=1.0,
            scale_dims=(),
        )
        return [norm, *(_relative(f, self.plates, scale_of(self.template)) for f in self.factors)]

    def maximum(self) -> Tensor:
        """max over all sequences of log p̃, [B]."""
        with torch.no_grad():
            return kernel.viterbi(*self.as_one(), self.lengths)[1]

    def given(
        self, states: Mapping[str, Tensor], order: Sequence[str], plate_sizes: Mapping[str, int]
    ) -> Given:
        """The group as single chains at chosen states of the other sites in its batch.

        states: [S, *plates in `order`, size 1 where a site has none]. The batch of the result is S × the group's plates.
        """
        initial, transition, emission = self.as_one()
        others = [d for d in self.batch if d in states]
        samples = max([states[d].shape[0] for d in others], default=1)
        plates = [p for p in order if p in self.plates]
        index: list[Tensor] = []
        shape = (samples, *(plate_sizes[p] for p in plates))
        for dim in self.batch:
            if dim in states:
                drop = [1 + i for i, p in enumerate(order) if p not in self.plates]
                index.append((states[dim].squeeze(drop) if drop else states[dim]).expand(shape))
            else:
                place = [1] * len(shape)
                place[1 + plates.index(dim)] = plate_sizes[dim]
                index.append(
                    torch.arange(plate_sizes[dim], device=emission.device).reshape(place).expand(shape)
                )

        def pick(tensor: Tensor) -> Tensor:
            if tensor.shape[0] == 1 and prod(self.sizes) != 1:
                return tensor
            full = tensor.reshape([*self.sizes, *tensor.shape[1:]])
            return full[tuple(index)].reshape(-1, *tensor.shape[1:]) if index else tensor

        lengths = None if self.lengths is None else pick(self.lengths)
        whole = pick(emission)
        count = prod(shape)
        whole = whole.expand(count, *whole.shape[1:]) if whole.shape[0] == 1 else whole
        if lengths is not None:
            lengths = lengths.expand(count)
        return Given(pick(initial), pick(transition), whole, lengths, shape, self.joint_sizes)


@dataclass(frozen=True)
class Given:
    """Single chains [B = prod(shape)] over joint states, and how to take those apart. shape: [S, *plates]."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None
    shape: tuple[int, ...]
    joint_sizes: tuple[int, ...]

    def mode(self) -> list[Tensor]:
        """The most probable states of each chain, [*shape, T]."""
        states, _ = kernel.viterbi(self.initial, self.transition, self.emission, self.lengths)
        return self._apart(states.reshape(*self.shape, -1))

    def sample(self, num_samples: int, generator: torch.Generator) -> list[Tensor]:
        """States of each chain, [*shape, T]; `num_samples` of them where the batch holds a single one to repeat."""
        draws = num_samples if self.shape[0] == 1 else 1
        states = kernel.sample(
            self.initial, self.transition, self.emission, self.lengths, num_samples=draws, generator=generator
        )
        return self._apart(states.reshape(num_samples, *self.shape[1:], states.shape[-1]))

    def log_prob(self, states: Sequence[Tensor]) -> Tensor:
        """log p(sequences | x, other sites), [*shape] (leading axes of `states` [S, *plates, T])."""
        joint = states[0]
        for size, part in zip(self.joint_sizes[1:], states[1:], strict=True):
            joint = joint * size + part
        found = kernel.marginals(self.initial, self.transition, self.emission, self.lengths)
        if self.shape[0] == 1:
            value = found.log_prob(joint.reshape(joint.shape[0], -1, joint.shape[-1]))
        else:
            value = found.log_prob(joint.reshape(-1, joint.shape[-1]))
        return value.reshape(joint.shape[:-1])

    def _apart(self, joint: Tensor) -> list[Tensor]:
        parts = []
        for size in reversed(self.joint_sizes):
            parts.append(joint % size)
            joint = torch.div(joint, size, rounding_mode="floor")
        return parts[::-1]


def entropies(group: Group) -> Tensor:
    """H of the group's sequences in each element of its batch, [*sizes]."""
    return kernel.entropy(*group.as_one(), group.lengths).reshape(group.sizes)


def build_group(
    names: tuple[str, ...],
    factors: Sequence[Factor],
    variables: Mapping[str, Variable],
    plate_sizes: Mapping[str, int],
    owner: Mapping[str, str],
) -> Group:
    first = variables[names[0]]
    steps = first.steps or 0
    plates = frozenset(first.plates)
    for name in names[1:]:
        other = variables[name]
        if other.steps != steps or frozenset(other.plates) != plates:
            raise IntractableError(
                f"chains {', '.join(names)}",
                "the same number of steps and the same plates for chains that meet in one factor",
                "different ones",
                "give them one length, or couple them by writing a single chain over the product of their states",
            )
    joint = prod(variables[n].size for n in names)
    if joint > MAX_JOINT_STATES:
        product = " × ".join(str(variables[n].size) for n in names)
        raise IntractableError(
            f"chains {', '.join(names)}",
            f"at most {MAX_JOINT_STATES:,} joint states",
            f"{product} = {joint:,}",
            "use svi or vem",
        )
    time = time_axis(steps)
    initial = {f.site: f for f in factors if f.site in names}
    moves = [f for f in factors if f.site not in names and f.site.removesuffix("·transition") in names]
    seen = [
        f
        for f in factors
        if f.site not in names
        and f.site.removesuffix("·transition") not in names
        and any(owner.get(d) in names for d in f.dims)
    ]
    _check_plates(names, plates, seen, variables)
    inside = (*initial.values(), *moves, *(f for f in seen if f.plates == plates))
    scale = common_scale(map(scale_of, inside), (f.site.removesuffix("·transition") for f in inside))
    emissions = [_multiplied_out(f, plates, plate_sizes, scale) for f in seen]
    own = {*names, time, *(a for n in names for a in chain_axes(n, steps))}
    tensors = [Named(f.log_prob, f.dims) for f in (*initial.values(), *moves)] + emissions
    others = union(n.dims for n in tensors)
    lengths = [variables[n] for n in names if variables[n].lengths is not None]
    batch = tuple(
        sorted(
            (d for d in union([others, *(v.lengths_dims for v in lengths)]) if d not in own),
            key=lambda d: (d in plate_sizes, d),
        )
    )
    sizes = tuple(_size(d, variables, plate_sizes) for d in batch)
    return Group(
        names,
        batch,
        sizes,
        plates,
        tuple(_initial(initial[n], n, variables[n], batch, sizes) for n in names),
        tuple(_transition(moves, n, variables[n], batch, sizes) for n in names),
        _emission(emissions, names, variables, time, batch, sizes, tensors[0].tensor),
        _lengths(lengths, batch, sizes),
        (*initial.values(), *moves, *seen),
    )


def _size(dim: str, variables: Mapping[str, Variable], plate_sizes: Mapping[str, int]) -> int:
    return variables[dim].size if dim in variables else plate_sizes[dim]


def _check_plates(
    names: tuple[str, ...],
    plates: frozenset[str],
    seen: Sequence[Factor],
    variables: Mapping[str, Variable],
) -> None:
    """A site of an inner plate that meets a chain ties all its steps together: the sum is no longer over a chain."""
    for factor in seen:
        for name in factor.dims:
            inner = set(variables[name].plates) - plates if name in variables else None
            if inner:
                raise IntractableError(
                    f"site '{name}' in plate {', '.join(sorted(inner))}",
                    f"sites that meet the chain {', '.join(names)} to stand in its plates or around them",
                    f"one of a plate inside, which ties all steps together in site '{factor.site}'",
                    "write that plate as a Python loop, or leave the site to a guide (svi)",
                )


def _multiplied_out(
    factor: Factor, plates: frozenset[str], plate_sizes: Mapping[str, int], scale: Named
) -> Named:
    """Plates inside the chain's own (sensors, say) add up, weighed by the scale that they carry beyond the chain's."""
    inner = factor.plates - plates
    named = Named(factor.log_prob, factor.dims)
    if inner:
        named = times(named, ratio(scale_of(factor), scale))
    axes = [i for i, d in enumerate(named.dims) if d in inner]
    tensor = named.tensor.sum(axes) if axes else named.tensor
    absent = prod(plate_sizes[p] for p in inner if p not in named.dims)
    return Named(tensor * absent if absent != 1 else tensor, tuple(d for d in named.dims if d not in inner))


def _relative(factor: Factor, plates: frozenset[str], scale: Named) -> Factor:
    """The factor with the scale that it carries beyond that of `plates`: none, unless it stands in a plate inside."""
    if not factor.plates - plates:
        return replace(factor, scale=1.0, scale_dims=())
    tensor, dims = ratio(scale_of(factor), scale)
    return replace(factor, scale=tensor, scale_dims=dims)


def _flat(tensor: Tensor, batch: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor:
    """[*batch (size 1 where absent), …] → [B|1, …]."""
    lead = tensor.shape[: len(batch)]
    tail = tensor.shape[len(batch) :]
    if all(s == 1 for s in lead):
        return tensor.reshape(1, *tail)
    return tensor.expand(*sizes, *tail).reshape(-1, *tail)


def _initial(
    factor: Factor, name: str, variable: Variable, batch: tuple[str, ...], sizes: tuple[int, ...]
) -> Tensor:
    tensor = align(Named(factor.log_prob, factor.dims), (*batch, name))
    return _flat(tensor.expand(*tensor.shape[:-1], variable.size), batch, sizes)


def _transition(
    factors: Sequence[Factor], name: str, variable: Variable, batch: tuple[str, ...], sizes: tuple[int, ...]
) -> Tensor:
    step, before, after = chain_axes(name, variable.steps or 0)
    total: Tensor | None = None
    for factor in factors:
        if factor.site == f"{name}·transition":
            part = align(Named(factor.log_prob, factor.dims), (*batch, step, before, after))
            total = part if total is None else total + part
    assert total is not None
    return _flat(total.expand(*total.shape[:-2], variable.size, variable.size), batch, sizes)


def _emission(
    emissions: Sequence[Named],
    names: tuple[str, ...],
    variables: Mapping[str, Variable],
    time: str,
    batch: tuple[str, ...],
    sizes: tuple[int, ...],
    like: Tensor,
) -> Tensor:
    """Σ of what depends on the chains, [B, T, K₁, …, K_L]."""
    states = tuple(variables[n].size for n in names)
    steps = variables[names[0]].steps or 0
    total: Tensor | None = None
    for named in emissions:
        part = align(named, (*batch, time, *names))
        total = part if total is None else total + part
    if total is None:
        total = torch.zeros((), dtype=like.dtype, device=like.device)
    return total.expand(*sizes, steps, *states).reshape(-1, steps, *states)


def _lengths(variables: Sequence[Variable], batch: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor | None:
    if not variables:
        return None
    tables = [
        align(Named(v.lengths, v.lengths_dims), batch).expand(sizes).reshape(-1)
        for v in variables
        if v.lengths is not None
    ]
    for other in tables[1:]:
        if not torch.equal(other, tables[0]):
            listing = ", ".join(v.name for v in variables)
            raise IntractableError(
                f"chains {listing}", "the same lengths for chains that meet in one factor", "different ones"
            )
    return tables[0]


def _factorial_log_partition(group: Group) -> Tensor:
    """Forward recursion over the joint states of L chains, one chain's transition at a time; log domain, [B]."""
    emission, count = group.emission, len(group.names)
    alpha = emission[:, 0]
    for i, initial in enumerate(group.initial):
        shape = [initial.shape[0], *(initial.shape[1] if j == i else 1 for j in range(count))]
        alpha = alpha + initial.reshape(shape)
    for t in range(1, emission.shape[1]):
        following = alpha
        for i, transition in enumerate(group.transition):
            step = transition[:, 0 if transition.shape[1] == 1 else t - 1]  # [B|1, K, K']
            moved = following.movedim(1 + i, -1).unsqueeze(-1)  # [B, others…, K, 1]
            shape = [step.shape[0], *[1] * (count - 1), *step.shape[1:]]
            following = log_sum_exp(moved + step.reshape(shape), -2).movedim(-1, 1 + i)
        following = following + emission[:, t]
        if group.lengths is None:
            alpha = following
        else:
            running = (group.lengths > t).reshape(-1, *[1] * count)
            alpha = torch.where(running, following, alpha)
    return log_sum_exp(alpha.flatten(1), 1)
