"""Forward and backward sweeps over Markov chains in the log domain: slower, and right for any range of the factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lvmppl.exact.chain_factors import Chain, columns, pick


class Logarithmic:
    """The quantities of the scaled sweeps from log α_t and log β_t in float64, normalised at every step.

    Memory B·T·K, and B·K² within a step; ragged lengths by masks.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain = chain.double()
        batch, steps, _ = chain.log_likelihood.shape
        everywhere = torch.ones(steps, batch, dtype=torch.bool, device=chain.log_likelihood.device)
        valid = chain.valid()
        self.valid = everywhere if valid is None else valid
        self.log_forward = chain.log_likelihood.transpose(0, 1).clone()
        self.log_norm = self.log_forward.new_zeros(steps, batch)
        for t in range(steps):
            log_predicted = self._predict(t) if t else chain.log_initial
            log_alpha = self.log_forward[t] + log_predicted
            norm = torch.logsumexp(log_alpha, -1)
            self.log_norm[t] = norm.masked_fill(~self.valid[t], 0.0)
            log_alpha = log_alpha - _finite(norm).unsqueeze(-1)
            self.log_forward[t] = log_alpha.masked_fill_(~self.valid[t].unsqueeze(-1), -torch.inf)
        self.log_evidence = self.log_norm.sum(0)
        self.log_forward.masked_fill_((self.log_evidence == -torch.inf).unsqueeze(-1), -torch.inf)

    def _predict(self, t: int) -> Tensor:
        """log Σ_j α_{t-1}(j) A(j, ·): [B, K]."""
        pairs = self.log_forward[t - 1].unsqueeze(-1) + self.chain.at_step(self.chain.log_transition, t - 1)
        return torch.logsumexp(pairs, -2)

    def run_backward(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """γ [T, B, K], and Σ w_b ξ_t over what log_transition shares, in its shape; weights [B].

        Keeps log u = ℓ + log β − log c for the pairs.
        """
        log_beta = torch.zeros_like(self.log_forward)
        self.log_weighted = torch.empty_like(self.log_forward)
        likelihood = self.chain.log_likelihood.transpose(0, 1)
        counts = torch.zeros_like(self.chain.log_transition)
        for t in range(len(log_beta) - 1, 0, -1):
            log_u = likelihood[t] + log_beta[t] - _finite(self.log_norm[t]).unsqueeze(-1)
            running = self.valid[t].unsqueeze(-1)
            self.log_weighted[t] = log_u.masked_fill_(~running, -torch.inf)
            pairs = self.chain.at_step(self.chain.log_transition, t - 1) + self.log_weighted[t].unsqueeze(-2)
            log_beta[t - 1] = torch.logsumexp(pairs, -1).masked_fill_(~running, 0.0)
            pair = (pairs + self.log_forward[t - 1].unsqueeze(-1)).exp_()
            if weights is not None:
                pair *= weights.double()[:, None, None]
            self.chain.at_step(counts, t - 1).add_(pair.sum(0) if self.chain.shared else pair)
        return (self.log_forward + log_beta).exp_(), counts

    def pairwise(self, unary: Tensor, t: int) -> Tensor:
        """ξ_t = α_t A u_{t+1}: [B, K, K]."""
        matrix = self.chain.at_step(self.chain.log_transition, t)
        return (self.log_forward[t].unsqueeze(-1) + matrix + self.log_weighted[t + 1].unsqueeze(-2)).exp_()

    def draw(self, t: int, uniform: Tensor, following: Tensor) -> Tensor:
        """z_t ~ p(z_t | z_{t+1} = following, x) from `uniform`, [S, B] each; z_t ~ α_t at a last step."""
        log_weights = self.log_forward[t].expand(len(uniform), -1, -1)
        if t + 1 < len(self.valid):
            conditional = log_weights + columns(self.chain.at_step(self.chain.log_transition, t), following)
            log_weights = torch.where(self.valid[t + 1].unsqueeze(-1), conditional, log_weights)
        peak = _finite(log_weights.amax(-1, keepdim=True))
        return pick((log_weights - peak).exp(), uniform)


def _finite(values: Tensor) -> Tensor:
    """−∞ replaced by 0, so that it can be subtracted."""
    return values.masked_fill(values == -torch.inf, 0.0)
