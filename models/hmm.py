"""Hidden Markov models.

    z_1 ─→ z_2 ─→ … ─→ z_T          sequences n = 1 … N
     ↓      ↓           ↓
    x_1    x_2         x_T

    p(x, z; θ) = Π_n π(z_1) Π_t P(z_t, z_{t+1}) Π_t p(x_t | z_t)

Shapes: N sequences, T steps, K states, D features, V symbols.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from lvmppl.distributions import MarkovChain

Emission = Literal["categorical", "gaussian", "poisson", "bernoulli"]
EmissionFunction = Callable[[Tensor], Any]


def hidden_markov(
    x: Tensor,
    lengths: Tensor | None = None,
    *,
    num_states: int,
    emission: Emission = "categorical",
    num_symbols: int | None = None,
) -> None:
    """A hidden Markov model with K states of sequences x [N, T], or [N, T, D] of features independent given the state.

    lengths: [N] steps of each sequence, None when all have T; what stands beyond a length is not read.
    num_symbols: V of a categorical emission (default: the largest symbol + 1).

    θ: `initial` [K]; `transition` [K, K], each row from a state; and by `emission`
    `categorical`: `emission` [K, V]; `gaussian`: `loc` and `variance` [K] or [K, D]; `poisson`: `rate` [K] or
    [K, D]; `bernoulli`: `probs` [K] or [K, D].

    The start is a function of the data alone: states that tend to stay, with emissions spread over the data.

    Latent: `z` [N, T], one site for whole sequences. Observed: `x`.
    """
    if emission not in _EMISSIONS:
        raise ValueError(f"emission must be one of {', '.join(_EMISSIONS)}, got {emission!r}")
    if num_states < 1:
        raise ValueError(f"num_states must be at least 1, got {num_states}")
    if x.dim() != 2 and (x.dim() != 3 or emission == "categorical"):
        one = "one sequence is x.unsqueeze(0); in a YAML, long-form rows become sequences by"
        ways = "`data: {time: COLUMN}` (one) or `data: {sequence: COLUMN, time: COLUMN}`"
        hint = f"; {one} {ways}" if x.dim() == 1 else ""
        raise ValueError(
            f"x must have shape [N, T] or, unless categorical, [N, T, D], got {tuple(x.shape)}{hint}"
        )
    size, steps = x.shape[:2]
    valid = torch.ones(size, steps, dtype=torch.bool, device=x.device)
    if lengths is not None:
        valid = torch.arange(steps, device=x.device) < lengths.unsqueeze(-1)  # [N, T]
        x = torch.where(valid if x.dim() == 2 else valid.unsqueeze(-1), x, 0)
    start = _Start(x, valid, num_states, num_symbols)
    initial = pyro.param("initial", start.initial, constraint=constraints.simplex)
    transition = pyro.param("transition", start.transition, constraint=constraints.simplex)
    emit = _EMISSIONS[emission](start)
    with pyro.plate("data", size):
        z = pyro.sample(
            "z", MarkovChain(initial, transition, steps, lengths), infer={"enumerate": "parallel"}
        )
        fn = emit(z)
        fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, (size, steps)))
        if lengths is not None:
            fn = fn.mask(valid)
        pyro.sample("x", fn.to_event(1), obs=x.long() if emission == "categorical" else x.to(start.dtype))


# Each declares the parameters of its family and returns states -> distribution of what they emit.


def _categorical(start: _Start) -> EmissionFunction:
    emission = pyro.param("emission", start.symbols, constraint=constraints.simplex)
    return lambda z: dist.Categorical(emission[z])


def _gaussian(start: _Start) -> EmissionFunction:
    loc = pyro.param("loc", start.loc)
    variance = pyro.param("variance", start.variance, constraint=constraints.positive)
    return lambda z: _features(dist.Normal(loc[z], variance[z].sqrt()), loc)


def _poisson(start: _Start) -> EmissionFunction:
    rate = pyro.param("rate", start.rate, constraint=constraints.positive)
    return lambda z: _features(dist.Poisson(rate[z]), rate)


def _bernoulli(start: _Start) -> EmissionFunction:
    probs = pyro.param("probs", start.probs, constraint=constraints.unit_interval)
    return lambda z: _features(dist.Bernoulli(probs[z]), probs)


def _features(fn: Any, table: Tensor) -> Any:
    """Features of one step, if there are several, as one event."""
    return fn.to_event(table.dim() - 1)


_EMISSIONS: dict[str, Callable[[_Start], EmissionFunction]]
_EMISSIONS = {
    "categorical": _categorical,
    "gaussian": _gaussian,
    "poisson": _poisson,
    "bernoulli": _bernoulli,
}


class _Start:
    """Where θ starts: rows x_t are grouped by what they look like, ignoring time, and a state emits as its group does."""

    def __init__(self, x: Tensor, valid: Tensor, num_states: int, num_symbols: int | None) -> None:
        self.x, self.valid, self.num_states, self.num_symbols = x, valid, num_states, num_symbols
        self.dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()

    def initial(self) -> Tensor:
        return torch.full((self.num_states,), 1.0 / self.num_states, dtype=self.dtype, device=self.x.device)

    def transition(self) -> Tensor:
        """Stay with probability 0.8, else go anywhere."""
        stay = torch.eye(self.num_states, dtype=self.dtype, device=self.x.device)
        return 0.8 * stay + 0.2 / self.num_states

    def symbols(self) -> Tensor:
        """The symbols' frequencies, tilted by a wave of another phase for each state."""
        seen = self.x[self.valid].long()
        size = int(seen.max()) + 1
        if bool((seen < 0).any()) or (self.num_symbols is not None and size > self.num_symbols):
            allowed = "0 … V - 1" if self.num_symbols is None else f"0 … {self.num_symbols - 1}"
            raise ValueError(f"symbols must lie in {allowed}, got {int(seen.min())} … {int(seen.max())}")
        size = self.num_symbols or size
        frequency = torch.bincount(seen, minlength=size).to(self.dtype) + 1.0  # [V]
        golden = (math.sqrt(5.0) - 1.0) / 2.0  # phases of neighbouring symbols never fall into step
        phase = self._levels().unsqueeze(-1) / 2.0 + golden * torch.arange(
            size, device=self.x.device
        )  # [K, V]
        weights = frequency * (1.0 + 0.5 * torch.cos(2.0 * torch.pi * phase))
        return weights / weights.sum(-1, keepdim=True)

    def loc(self) -> Tensor:
        """Means of the groups; a thousandth of a standard deviation apart where they would be the same."""
        mean, _ = self._moments
        sd = self._rows.var(0, unbiased=False).sqrt()
        return self._shaped(mean + 1e-3 * sd * self._levels().unsqueeze(-1))

    def variance(self) -> Tensor:
        return self._shaped(self._moments[1])

    def rate(self) -> Tensor:
        mean, _ = self._moments
        return self._shaped((mean * (1.0 + 1e-3 * self._levels().unsqueeze(-1))).clamp_min(1e-3))

    def probs(self) -> Tensor:
        mean, _ = self._moments
        return self._shaped((mean + 0.01 * self._levels().unsqueeze(-1)).clamp(0.02, 0.98))

    def _levels(self) -> Tensor:
        """−1 … 1 over the states [K]; the last short of 1, as a phase of −1 and 1 is the same."""
        k = torch.arange(self.num_states, dtype=self.dtype, device=self.x.device)
        return (2.0 * k + 1.0) / self.num_states - 1.0

    def _shaped(self, table: Tensor) -> Tensor:
        """[K, D] as a parameter: [K] for x [N, T]."""
        return table.squeeze(-1) if self.x.dim() == 2 else table

    @cached_property
    def _rows(self) -> Tensor:
        """The x_t within their sequences [M, D]; at most 10 000 of them, evenly spaced."""
        rows = self.x[self.valid].detach().to(self.dtype).reshape(int(self.valid.sum()), -1)
        return rows[torch.linspace(0, len(rows) - 1, min(len(rows), 10_000), dtype=torch.float64).long()]

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group [K, D], both drawn towards those of all by two rows' worth."""
        rows, group = self._rows, _group(self._rows, self.num_states)
        hot = torch.nn.functional.one_hot(group, self.num_states).to(rows.dtype)  # [M, K]
        count = hot.sum(0).unsqueeze(-1)
        overall = rows.var(0, unbiased=False).clamp_min(1e-12)
        mean = (hot.T @ rows + 2.0 * rows.mean(0)) / (count + 2.0)
        squares = (rows - mean[group]).square()
        pooled = squares.mean(0) + 1e-6 * overall
        return mean, (hot.T @ squares + 2.0 * pooled) / (count + 2.0)


def _group(rows: Tensor, num_groups: int) -> Tensor:
    """A group for each row [M]: equal shares along the direction of largest variance, then ten rounds of k-means."""
    scaled = (rows - rows.mean(0)) / rows.var(0, unbiased=False).clamp_min(1e-12).sqrt()
    direction = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -1]
    direction = direction * torch.where(
        direction[direction.abs().argmax()] < 0, -1.0, 1.0
    )  # eigh leaves the sign open
    rank = (scaled @ direction).argsort(stable=True).argsort()
    group = rank * num_groups // len(rows)
    for _ in range(10):
        hot = torch.nn.functional.one_hot(group, num_groups).to(rows.dtype)
        centres = hot.T @ scaled / hot.sum(0).clamp_min(1.0).unsqueeze(-1)
        centres = torch.where(hot.sum(0).unsqueeze(-1) > 0, centres, torch.inf)  # an empty group stays empty
        group = torch.cdist(scaled, centres).argmin(1)
    found: Tensor = group
    return found
