"""Whether what depends on a Markov chain does so step by step, by probing: forward-backward is right for nothing else.

Enumeration hands the model the states of one step, and the model's log-densities are read as those of each step. A model
that shifts, flips or averages the states over time would be misread without a sign of it. So a few rows are evaluated
again on a few state sequences z that vary over time: what this gives at step t must be what enumeration gave at z_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from lvmppl.density.discovery import num_rows
from lvmppl.density.enumeration import Enumeration
from lvmppl.density.handlers import EnumerateChains, Paths
from lvmppl.density.isolation import unvalidated
from lvmppl.density.joint import Joint
from lvmppl.density.structure import Evaluation, Factor, Rows, Values, Variable, time_axis
from lvmppl.errors import ModelError

_ROWS = 8  # evaluated again, spread over all
_STEPS = 2048  # in all sequences together: few where they are long, for a distribution over V symbols each weighs T·V


def check_steps(joint: Joint, data: Values, values: Values, known: Evaluation | None = None) -> None:
    """Refuse a model in which an observation at step t depends on other states of its chain than z_t.

    known: the model at `values` on all rows, its chains enumerated, where nothing of it was drawn.

    Raises:
        ModelError: names the site and the chain.
    """
    structure = joint.structure
    if not any(structure.sites[n].family == "MarkovChain" for n in structure.enumerated):
        return
    rows, plate = Rows(num_rows(data)), structure.data_plate
    if plate is not None and rows.size > _ROWS:
        indices = torch.linspace(0, rows.size - 1, _ROWS).long()
        rows, data = Rows(rows.size, indices), {k: v[indices] for k, v in data.items()}
        known = known and _at_rows(known, plate, indices)
    pinned = Pinned(joint.first_available_dim)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unvalidated():
        first = known or Probe(joint, pinned, None).evaluate(data, values, rows)
        meeting = max(1, *(len(_chains_of(f, first.variables)) for f in first.factors))
        paths = partial(sequences, chains=meeting)
        again = Probe(joint, pinned, paths).evaluate(data, values, rows)
        for before, after in zip(first.factors, again.factors, strict=True):
            _compare(before, after, first.variables, paths)
            _check_masked(before, first.variables)


def _at_rows(evaluation: Evaluation, plate: str, indices: Tensor) -> Evaluation:
    """Some rows of an evaluation: its factors and lengths (their scales are not looked at)."""

    def picked(tensor: Tensor, dims: tuple[str, ...]) -> Tensor:
        if plate not in dims:
            return tensor
        axis = dims.index(plate)
        return tensor.movedim(axis, 0)[indices].movedim(
            0, axis
        )  # index_select would copy the whole of a permuted one

    factors = tuple(replace(f, log_prob=picked(f.log_prob, f.dims)) for f in evaluation.factors)
    variables = {
        n: v if v.lengths is None else replace(v, lengths=picked(v.lengths, v.lengths_dims))
        for n, v in evaluation.variables.items()
    }
    return replace(evaluation, factors=factors, variables=variables)


class Pinned(Messenger):
    """Sites that are not enumerated, and subsamples, stand where they were first drawn, the same under every state of the
    others."""

    def __init__(self, first_axis: int) -> None:
        super().__init__()
        self.first_axis = first_axis
        self.points: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or msg["infer"].get("enumerate") == "parallel":
            return
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            msg["value"], msg["done"] = self.points.setdefault(name, fn.sample()), True
            return
        if name not in self.points:
            value = fn.sample()
            own = -self.first_axis - 1 + fn.event_dim
            while value.dim() > own:
                value = value[0]
            self.points[name] = value
        msg["value"], msg["done"] = self.points[name], True


class Probe(Joint):
    """The model with each chain at given sequences of states, or at the states of one step."""

    def __init__(self, joint: Joint, pinned: Pinned, paths: Paths | None) -> None:
        super().__init__(joint.model, joint.structure)
        self.pinned, self.paths = pinned, paths

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        chains = EnumerateChains(self.paths)
        with Enumeration(first_available_dim=self.first_available_dim), chains, self.pinned:
            yield


def sequences(steps: int, states: int, chains: int = 1) -> Tensor:
    """Sequences of states [M, T]: random ones, ones whose neighbours differ, and ones whose halves differ, in turn.

    chains: that meet in a factor, which then has M_1 · M_2 · … sequences: where they are many, no more than joint states.
    """
    most = int((_STEPS // steps) ** (1 / chains)) // 3 * 3
    least = 3 if chains == 1 else min(3, states)
    count = 1 if states == 1 else max(least, min(3 * states, most))
    generator, t = torch.Generator().manual_seed(steps), torch.arange(steps)
    kinds = (
        lambda _: torch.randint(states, (steps,), generator=generator),
        lambda offset: (t + offset) % states,
        lambda offset: ((t >= steps // 2).long() + offset) % states,
    )
    return torch.stack([kinds[i % 3](i // 3) for i in range(count)])


def _chains_of(factor: Factor, variables: Mapping[str, Variable]) -> list[str]:
    return [d for d in factor.dims if d in variables and variables[d].steps]


def _compare(before: Factor, after: Factor, variables: Mapping[str, Variable], paths: Paths) -> None:
    """The factor at the sequences against the one at the states of one step, looked up at theirs."""
    chains = _chains_of(after, variables)
    if not chains:
        return
    same = before.dims == after.dims
    if same and not all(time_axis(variables[c].steps or 0) in before.dims for c in chains):
        return  # one log-probability for a whole sequence, which elimination refuses itself
    tolerance = 1e-6 if after.log_prob.dtype == torch.float64 else 1e-3
    expected = _looked_up(before, chains, variables, paths) if same else after.log_prob
    if (
        not same
        or expected.shape != after.log_prob.shape
        or not torch.allclose(expected, after.log_prob, rtol=tolerance, atol=tolerance, equal_nan=True)
    ):
        raise ModelError(
            f"site '{after.site}'",
            f"to depend at step t on the state of the chain {', '.join(chains)} at step t alone",
            "a dependence on its states at other steps",
            "use the states as they are (table[z]); for a longer memory enlarge the state",
        )


def _check_masked(factor: Factor, variables: Mapping[str, Variable]) -> None:
    """Nothing is observed of a chain that is over: the sweeps do not read it, while plain Pyro would score it."""
    for name in factor.dims:
        variable = variables.get(name)
        time = time_axis(variable.steps or 0) if variable is not None else ""
        if variable is None or variable.lengths is None or time not in factor.dims:
            continue
        order = [variable.lengths_dims.index(d) for d in factor.dims if d in variable.lengths_dims]
        lengths = variable.lengths.permute(order)[
            tuple(slice(None) if d in variable.lengths_dims else None for d in factor.dims)
        ]
        step = [-1 if d == time else 1 for d in factor.dims]
        over = torch.arange(variable.steps or 0, device=lengths.device).reshape(step) >= lengths
        if bool((factor.log_prob.masked_fill(~over, 0.0) != 0.0).any()):
            raise ModelError(
                f"site '{factor.site}'",
                f"to be masked beyond the lengths of the chain {name}",
                "log-densities there, which plain Pyro counts and the sum over sequences leaves out",
                "write fn.mask(torch.arange(T) < lengths.unsqueeze(-1)) before .to_event(1)",
            )


def _looked_up(factor: Factor, chains: list[str], variables: Mapping[str, Variable], paths: Paths) -> Tensor:
    """log f_t(z_t) for the sequences z of each chain: its axis of K states becomes one of M sequences."""
    result = factor.log_prob
    for chain in chains:
        size, steps = variables[chain].size, variables[chain].steps or 0
        axis, time = factor.dims.index(chain), factor.dims.index(time_axis(steps))
        states = paths(steps, size).to(result.device)  # [M, T]
        shape, wanted = [1] * result.dim(), list(result.shape)
        shape[axis], shape[time], wanted[axis] = len(states), steps, len(states)
        states = (states if axis < time else states.T).reshape(shape)
        result = result.gather(axis, states.expand(wanted))
    return result
