"""The log-factors of a batch of Markov chains, and what every sweep over them contracts.

A chain is a product of factors over a state sequence z_1 … z_T,

    log p̃(z) = a(z_1) + Σ_t A_t(z_t, z_{t+1}) + Σ_t ℓ_t(z_t),

which need not be normalised. Shapes: B sequences, T steps, K states; a leading 1 means "the same for all".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """log_initial a [B|1, K], log_transition A [B|1, T-1|1, K, K], log_likelihood ℓ [B, T, K].

    lengths: [B] in 1 … T, or None when every sequence has T steps. Factors beyond a length are not read.
    """

    log_initial: Tensor
    log_transition: Tensor
    log_likelihood: Tensor
    lengths: Tensor | None = None

    @property
    def shared(self) -> bool:
        """Whether one transition serves all sequences."""
        return self.log_transition.shape[0] == 1

    @property
    def homogeneous(self) -> bool:
        """Whether one transition serves all steps."""
        return self.log_transition.shape[1] == 1

    def rows(self, index: Tensor) -> Chain:
        """The sequences at `index`, in that order."""
        initial, transition = (
            t if len(t) == 1 else t[index] for t in (self.log_initial, self.log_transition)
        )
        lengths = None if self.lengths is None else self.lengths[index]
        return Chain(initial, transition, self.log_likelihood[index], lengths)

    def double(self) -> Chain:
        """The same chain in float64."""
        return Chain(
            self.log_initial.double(),
            self.log_transition.double(),
            self.log_likelihood.double(),
            self.lengths,
        )

    def detach(self) -> Chain:
        """The same chain outside of autograd."""
        return Chain(
            self.log_initial.detach(),
            self.log_transition.detach(),
            self.log_likelihood.detach(),
            self.lengths,
        )

    def valid(self) -> Tensor | None:
        """[T, B]: which steps lie within their sequence; None when all do."""
        if self.lengths is None:
            return None
        steps = torch.arange(self.log_likelihood.shape[1], device=self.lengths.device)
        return steps.unsqueeze(1) < self.lengths

    def padded(self) -> Chain:
        """The same chain with ℓ = 0 beyond the lengths, whatever stood there (NaN included)."""
        valid = self.valid()
        if valid is None:
            return self
        return replace(self, log_likelihood=self.log_likelihood.masked_fill(~valid.T.unsqueeze(-1), 0.0))

    def at_step(self, transition: Tensor, t: int) -> Tensor:
        """The matrices from step t to t + 1 of a tensor shaped like log_transition: [B|1, K, K]."""
        return transition[:, 0 if self.homogeneous else t]


def columns(matrices: Tensor, states: Tensor) -> Tensor:
    """matrices[b, :, states[s, b]]: [S, B, K] from [B|1, K, K] and [S, B]."""
    if len(matrices) == 1:
        return matrices[0].mT[states]
    return matrices.mT[torch.arange(len(matrices), device=states.device), states]


def pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The state where the running sum of `weights` [S|1, B, K] first exceeds `uniform` [S, B] times their sum.

    The threshold stays below the sum, so a state of weight 0 is never picked; where all are 0, state 0 is.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1]
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    picked = (cumulative <= threshold.unsqueeze(-1)).sum(-1)
    return picked.masked_fill_(total == 0.0, 0)


def lookup(table: Tensor, *states: Tensor, kept: int = 0) -> Tensor:
    """table[..., states[0], …] where the axes before those indexed broadcast against the axes of `states`.

    The last `kept` axes of the table are not indexed.
    """
    rank = states[0].dim()
    lead = table.shape[: table.dim() - len(states) - kept]
    index = []
    for axis, size in enumerate(lead):
        shape = [1] * rank
        shape[rank - len(lead) + axis] = size
        index.append(torch.arange(size, device=table.device).reshape(shape))
    return table[(*index, *states)]


def path_factors(log_initial: Tensor, log_transition: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """a(z_1) [...] and A_t(z_t, z_{t+1}) [..., T-1] along states [..., T].

    log_initial [*b, K] and log_transition [*b, T-1|1, K, K] broadcast against the batch axes of `states`.
    """
    initial = lookup(log_initial.unsqueeze(-2), states[..., :1]).squeeze(-1)
    before, after = states[..., :-1], states[..., 1:]
    if before.shape[-1] == 0:
        return initial, initial.new_zeros(before.shape)
    return initial, lookup(log_transition, before, after)
