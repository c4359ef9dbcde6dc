"""Whether enumeration reads a model as plain Pyro runs it: its log-densities at given states, both ways.

Enumerated values carry an axis of their states left of all plates. A model that loses this axis (`z.flatten()`, `z.sum()`,
`z.mean()`) computes one number over all states, which every enumeration engine takes for one that does not depend on z. So
a model whose first run looks like it (`Structure.mixed`) is run again on a few rows, its sites held at states as Pyro would
draw them: what every site's log-density is there must be what the table over all states says of these states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from lvmppl.density.discovery import num_rows
from lvmppl.density.handlers import EnumeratedChain, unmask
from lvmppl.density.isolation import derive_seed, isolated, unvalidated
from lvmppl.density.joint import Joint
from lvmppl.density.steps import Pinned, Probe
from lvmppl.density.structure import Factor, Rows, SiteView, Structure, Values, Variable, time_axis
from lvmppl.errors import InputError, ModelError
from lvmppl.wording import abridged

_ROWS = 8  # compared, spread over all
_ENTRIES = 1 << 22  # of the largest table that is compared
_CLOSE = (
    1e-6  # relative and absolute difference (nats) of two computations of the same log-density, in float64
)

Views = Mapping[str, SiteView]
States = dict[str, tuple[Tensor, tuple[str, ...]]]


def check_states(joint: Joint, data: Values, values: Values) -> None:
    """Refuse a model that computes something else under enumeration than at single states.

    What cannot be compared passes: a model that draws by itself or does not run without enumeration, a log-density over
    more than some million states, the prior of a Markov chain, a site that only a guide sums.

    Raises:
        ModelError: names the site, the enumerated ones and the operations.
    """
    structure = joint.structure
    if not structure.mixed:
        return
    every = Rows(num_rows(data))
    tried = [every]
    if structure.data_plate is not None and every.size > _ROWS:
        tried.insert(0, Rows(every.size, torch.linspace(0, every.size - 1, _ROWS).long()))
    for rows in tried:
        try:
            wrong = _disagreement(joint, data, values, rows)
        except (InputError, RuntimeError, IndexError, ValueError):  # it does not run so: nothing is known
            continue
        if wrong is not None:
            raise wrong
        return


def _disagreement(joint: Joint, data: Values, values: Values, rows: Rows) -> ModelError | None:
    if rows.indices is not None:
        data = {k: v[rows.indices] for k, v in data.items()}
    data, values = _doubled(data), _doubled(values)
    pinned = Pinned(joint.first_available_dim)

    def seen(model: Joint, seed: int = 0) -> tuple[Views, Mapping[str, Variable]]:
        torch.manual_seed(seed)
        views, evaluation = model.view(data, values, rows)
        return views, evaluation.variables

    with torch.no_grad(), isolated(0, torch.float64), unvalidated():
        views, variables = seen(Probe(joint, pinned, None))
        if set(variables) != set(joint.structure.enumerated):
            return None
        for choose in _CHOICES:
            standing = _Standing(variables, choose)
            plain, _ = seen(_AtStates(joint, pinned, standing))
            wrong = _first_difference(views, plain, variables, standing.states)
            if wrong is not None:
                again, _ = seen(Probe(joint, pinned, None), seed=1)
                return None if _differs(views, again) else _error(*wrong, joint.structure)
    return None


def _doubled(tensors: Values) -> Values:
    return {k: v.detach().double() if v.is_floating_point() else v for k, v in tensors.items()}


# (random states, their number K) → states. The largest and the smallest of many random states are those of an enumeration.
_CHOICES: tuple[Callable[[Tensor, int], Tensor], ...] = (
    lambda states, size: states,
    lambda states, size: (states + 1) % size,
    lambda states, size: torch.zeros_like(states),
    lambda states, size: torch.full_like(states, size - 1),
)


class _Standing(Messenger):
    """Enumerated sites stand at single states, each element of their plates at its own, as plain Pyro draws them.

    states: by site, with names of their axes. As in an enumeration the sites keep their priors whatever mask they stand
    under.
    """

    def __init__(self, variables: Mapping[str, Variable], choose: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.variables, self.choose = variables, choose
        self.states: States = {}

    def _pyro_sample(self, msg: Any) -> None:
        variable = self.variables.get(msg["name"])
        if variable is None or msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        unmask(msg)
        name, steps = msg["name"], () if variable.steps is None else (variable.steps,)
        shape = (*msg["fn"].batch_shape, *steps)
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        states = self.choose(torch.randint(variable.size, shape, generator=generator), variable.size)
        states = states.to(variable.support.device)
        axes = {f.dim - len(steps): f.name for f in msg["cond_indep_stack"] if f.vectorized}
        if steps:
            axes[-1] = time_axis(steps[0])
        kept = [a for a in range(-len(shape), 0) if shape[a] > 1]
        self.states[name] = states.reshape(torch.Size(shape[a] for a in kept)), tuple(axes[a] for a in kept)
        msg["value"], msg["done"] = variable.support[states], True
        msg["infer"] = {k: v for k, v in msg["infer"].items() if k != "enumerate"}


class _AtStates(Joint):
    """The model at single states, the other sites pinned where they were."""

    def __init__(self, joint: Joint, pinned: Pinned, standing: _Standing) -> None:
        super().__init__(joint.model, joint.structure)
        self.pinned, self.standing = pinned, standing

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        with self.pinned, self.standing:
            yield


def _first_difference(
    views: Views, plain: Views, variables: Mapping[str, Variable], states: States
) -> tuple[str, list[str]] | None:
    """The first site whose log-densities differ, and the enumerated ones around it."""
    for name, view in views.items():
        if name not in plain or isinstance(view.fn, EnumeratedChain) or _entries(view) > _ENTRIES:
            continue
        for table, single in zip(view.factors(), plain[name].factors(), strict=True):
            found = _looked_up(table, variables, states)
            if found is not None and not _equal(*found, single):
                return name, [d for d in table.dims if d in variables] or [*variables]
    return None


def _entries(view: SiteView) -> int:
    batch = view.value.shape[: view.value.dim() - view.fn.event_dim]
    return prod((*broadcast_shape(view.fn.batch_shape, batch), *view.fn.event_shape))


def _looked_up(
    factor: Factor, variables: Mapping[str, Variable], states: States
) -> tuple[Tensor, tuple[str, ...]] | None:
    """A factor's table at the states: its tensor and axes; None where these cannot be told apart there."""
    own = [d for d in factor.dims if d in variables]
    if any(not set(states[n][1]) <= factor.plates | set(factor.dims) for n in own):
        return None  # which elimination refuses, or a chain that is not seen step by step
    rest = (d for n in (*(states[n][1] for n in own), factor.dims) for d in n if d not in variables)
    dims = tuple(dict.fromkeys(rest))
    index = []
    for dim, size in zip(factor.dims, factor.log_prob.shape, strict=True):
        named = states[dim] if dim in variables else (torch.arange(size), (dim,))
        index.append(_aligned(*named, dims).to(factor.log_prob.device))
    table = factor.log_prob[tuple(index)] if index else factor.log_prob
    table = table.reshape(torch.Size([1] * (len(dims) - table.dim())) + table.shape)
    steps = [
        i for i, d in enumerate(dims) if d in {time_axis(v.steps) for v in variables.values() if v.steps}
    ]
    return (table.sum(steps) if steps else table), tuple(d for i, d in enumerate(dims) if i not in steps)


def _aligned(tensor: Tensor, given: tuple[str, ...], dims: tuple[str, ...]) -> Tensor:
    """With its axes in the order of `dims`, size 1 where it has none of that name."""
    tensor = tensor.permute([given.index(d) for d in dims if d in given])
    return tensor[tuple(slice(None) if d in given else None for d in dims)]


def _equal(table: Tensor, dims: tuple[str, ...], single: Factor) -> bool:
    both = tuple(dict.fromkeys((*dims, *single.dims)))
    found, expected = torch.broadcast_tensors(
        _aligned(table, dims, both), _aligned(single.log_prob, single.dims, both)
    )
    return torch.allclose(found, expected, rtol=_CLOSE, atol=_CLOSE, equal_nan=True)


def _differs(views: Views, again: Views) -> bool:
    """Whether two runs of the same differ: the model draws by itself."""
    for name in views:
        for a, b in zip(views[name].factors(), again[name].factors(), strict=True):
            if a.dims != b.dims or not torch.allclose(a.log_prob, b.log_prob, equal_nan=True):
                return True
    return False


def _error(site: str, states: list[str], structure: Structure) -> ModelError:
    return ModelError(
        f"site '{site}'",
        f"at single states of {abridged(states)} the log-density that enumeration finds for them",
        f"another: the axis of states, left of all plates, is lost or mixed, perhaps by {abridged(structure.mixed)}",
        "write it so that axes to the left are carried along: loc[z] for loc[z.flatten()], z.sum(-1) for z.sum()",
    )


__all__ = ["check_states"]
