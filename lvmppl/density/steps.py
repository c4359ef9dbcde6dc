"""Whether what depends on a Markov chain does so step by step, by probing: forward-backward is right for nothing else.

Enumeration hands the model the states of one step, and the model's log-densities are read as those of each step. A model
that shifts, flips or averages the states over time would be misread without a sign of it. So a few rows are evaluated
again with states that vary over time, by known shifts s_t: a factor of the first pass at (z_t + s_t) mod K must be what
the second pass gives at z_t.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from lvmppl.density.discovery import num_rows
from lvmppl.density.enumeration import Enumeration
from lvmppl.density.handlers import EnumerateChains
from lvmppl.density.isolation import unvalidated
from lvmppl.density.joint import Joint
from lvmppl.density.structure import Evaluation, Factor, Rows, Values, Variable, time_axis
from lvmppl.errors import ModelError

_ROWS = 8  # evaluated again, spread over all
_SHIFTS = 3


def check_steps(joint: Joint, data: Values, values: Values) -> None:
    """Refuse a model in which an observation at step t depends on other states of its chain than z_t.

    Raises:
        ModelError: names the site and the chain.
    """
    structure = joint.structure
    if not any(structure.sites[n].family == "MarkovChain" for n in structure.enumerated):
        return
    rows = Rows(num_rows(data))
    if structure.data_plate is not None and rows.size > _ROWS:
        indices = torch.linspace(0, rows.size - 1, _ROWS).long()
        rows, data = Rows(rows.size, indices), {k: v[indices] for k, v in data.items()}
    pinned = _Pinned(joint.first_available_dim)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), unvalidated():
        first = _Probe(joint, pinned, None).evaluate(data, values, rows)
        for index in range(_SHIFTS):
            again = _Probe(joint, pinned, index).evaluate(data, values, rows)
            for before, after in zip(first.factors, again.factors, strict=True):
                _compare(before, after, index, first)


class _Pinned(Messenger):
    """Sites that are not enumerated stand where they were first drawn, the same under every state of the others."""

    def __init__(self, first_axis: int) -> None:
        super().__init__()
        self.first_axis = first_axis
        self.points: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"] or site_is_subsample(msg):
            return
        if msg["infer"].get("enumerate") == "parallel":
            return
        name, fn = msg["name"], msg["fn"]
        if name not in self.points:
            value = fn.sample()
            own = -self.first_axis - 1 + fn.event_dim
            while value.dim() > own:
                value = value[0]
            self.points[name] = value
        msg["value"], msg["done"] = self.points[name], True


class _Probe(Joint):
    """The model with chains enumerated by states that are shifted over time."""

    def __init__(self, joint: Joint, pinned: _Pinned, index: int | None) -> None:
        super().__init__(joint.model, joint.structure)
        self.pinned, self.index = pinned, index

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        chains = EnumerateChains(None if self.index is None else lambda t, k: shifts(t, k, self.index or 0))
        with Enumeration(first_available_dim=self.first_available_dim), chains, self.pinned:
            yield


def shifts(steps: int, states: int, index: int) -> Tensor:
    """s_t in 0 … K−1, [T]: neighbours that differ; halves that differ; at random."""
    if index == 0:
        return torch.arange(steps) % states
    if index == 1:
        return (torch.arange(steps) >= steps // 2).long() % states
    return torch.randint(states, (steps,), generator=torch.Generator().manual_seed(steps))


def _compare(before: Factor, after: Factor, index: int, evaluation: Evaluation) -> None:
    """The factor with shifted states against the one with states of one step, moved by the same shifts."""
    chains = [d for d in after.dims if d in evaluation.variables and evaluation.variables[d].steps]
    if not chains:
        return
    same = before.dims == after.dims and before.log_prob.shape == after.log_prob.shape
    if same and not _by_step(chains, before, evaluation.variables):
        return  # one log-probability for a whole sequence, which elimination refuses itself
    tolerance = 1e-6 if after.log_prob.dtype == torch.float64 else 1e-3
    moved = _moved(before, chains, evaluation.variables, index) if same else after.log_prob
    if not same or not torch.allclose(moved, after.log_prob, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ModelError(
            f"site '{after.site}'",
            f"to depend at step t on the state of the chain {', '.join(chains)} at step t alone",
            "a dependence on its states at other steps",
            "use the states as they are (table[z]); for a longer memory enlarge the state",
        )


def _by_step(chains: list[str], factor: Factor, variables: Mapping[str, Variable]) -> bool:
    return all(time_axis(variables[c].steps or 0) in factor.dims for c in chains)


def _moved(factor: Factor, chains: list[str], variables: Mapping[str, Variable], index: int) -> Tensor:
    result = factor.log_prob
    for chain in chains:
        size, steps = variables[chain].size, variables[chain].steps or 0
        axis, time = factor.dims.index(chain), factor.dims.index(time_axis(steps))
        states = (torch.arange(size).unsqueeze(-1) + shifts(steps, size, index)) % size  # [K, T]
        shape = [1] * result.dim()
        shape[axis], shape[time] = size, steps
        states = (states if axis < time else states.T).reshape(shape).to(result.device)
        result = result.gather(axis, states.expand(result.shape))
    return result
