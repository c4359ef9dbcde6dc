"""Baselines of the score-function estimator: what is taken off a learning signal without moving the gradient's mean.

A baseline of draw z_j may depend on anything but z_j: on earlier steps (`running_mean`), on the other draws
(`leave_one_out`), or on the datum x⁽ⁿ⁾ through a network that learns to predict the signal (`learned`; Mnih & Gregor 2014).
E[b ∇ log q(z)] = 0 then, whatever b is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DECAY = 0.9  # of the running mean and variance, a step
WIDTH = 16  # of the hidden layer of a learned baseline
RATE = 0.01  # its learning rate (Adam)


class Baselines:
    """The baselines of a fit's score-function sites, by site, and what they have learned so far."""

    def __init__(self, kinds: Mapping[str, str], data_plate: str | None) -> None:
        self.kinds, self.data_plate = dict(kinds), data_plate
        self.means: dict[str, tuple[Tensor, Tensor]] = {}
        self.networks: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
        self.data: Mapping[str, Tensor] = {}

    def __call__(self, site: str, signal: Tensor, plates: Sequence[str]) -> Tensor:
        """The baseline of a signal [J, *plates], as it was before this signal; it is learned from afterwards."""
        kind = self.kinds[site]
        if kind == "none":
            return torch.zeros_like(signal)
        if kind == "leave_one_out":
            return (signal.sum(0, keepdim=True) - signal) / (len(signal) - 1)
        mean, spread = self._moments(site, signal)
        if kind == "running_mean":
            return mean.expand_as(signal)
        return mean + spread * self._predicted(site, (signal - mean) / spread, plates)

    def _moments(self, site: str, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and sd of earlier signals, (0, 1) before the first; this one is added."""
        known = self.means.get(site)
        zero, one = signal.new_zeros(()), signal.new_ones(())
        if bool(torch.isfinite(signal).all()):
            now = signal.mean(), signal.square().mean()
            old = now if known is None else known
            self.means[site] = tuple(DECAY * a + (1 - DECAY) * b for a, b in zip(old, now, strict=True))  # type: ignore[assignment]
        if known is None:
            return zero, one
        spread = (known[1] - known[0].square()).clamp_min(1e-12).sqrt()
        return known[0], spread

    def _predicted(self, site: str, target: Tensor, plates: Sequence[str]) -> Tensor:
        """The network's prediction of the standardised signal [1, *plates], one value a row of the data plate."""
        rows = self._rows(target) if self.data_plate in plates else target.new_ones(1, 1)
        with torch.enable_grad():
            if site not in self.networks:
                self.networks[site] = _network(rows.shape[-1], rows)
            network, optimizer = self.networks[site]
            shape = [1] * target.dim()
            if self.data_plate in plates:
                shape[1 + plates.index(str(self.data_plate))] = len(rows)
            prediction = network(rows).reshape(shape)
            if bool(torch.isfinite(target).all()):
                optimizer.zero_grad()
                (target - prediction).square().mean().backward()
                optimizer.step()
        result: Tensor = prediction.detach()
        return result

    def _rows(self, like: Tensor) -> Tensor:
        """What the network reads of each row [B, F]: every data tensor as numbers, squashed to a common size."""
        parts = [t.reshape(len(t), -1).to(like.dtype) for t in self.data.values()]
        return torch.asinh(torch.cat(parts, -1))


def _network(width: int, like: Tensor) -> tuple[nn.Module, torch.optim.Optimizer]:
    """tanh(W x + b) read out linearly, 0 at the start."""
    readout = nn.Linear(WIDTH, 1)
    nn.init.zeros_(readout.weight)
    nn.init.zeros_(readout.bias)
    network = nn.Sequential(nn.Linear(width, WIDTH), nn.Tanh(), readout).to(like)
    return network, torch.optim.Adam(network.parameters(), lr=RATE)
