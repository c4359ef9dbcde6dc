"""Sweeps over a batch of Markov chains: scaled, and again in a wider domain for the sequences that need it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.exact.chain_factors import Chain
from lvmppl.exact.chain_log import Logarithmic
from lvmppl.exact.chain_scaled import Scaled


class Sweep:
    """log Z and the posterior of B chains by one forward and one backward sweep.

    Inside, the sequences are sorted by length, so that a step works on those that still run. Sequences that the
    scaled domain cannot certify are swept again: from float32 in float64, from float64 in the log domain.
    Of an impossible sequence (log Z = −∞) all marginals and counts are 0.
    """

    def __init__(self, chain: Chain) -> None:
        chain = chain.detach()
        self.inverse: Tensor | None = None
        self.order: Tensor | None = None
        if chain.lengths is not None and bool((chain.lengths < chain.log_likelihood.shape[1]).any()):
            self.order = chain.lengths.argsort(descending=True, stable=True)
            self.inverse = self.order.argsort()
            chain = chain.rows(self.order).padded()
        else:
            chain = replace(chain, lengths=None)
        self.chain = chain
        self.scaled = Scaled(chain)
        log_evidence = self.scaled.log_evidence
        self.again: Sweep | Logarithmic | None = None
        self.rows = self.scaled.uncertified.nonzero().squeeze(-1)
        if len(self.rows):
            part = chain.rows(self.rows)
            wide = log_evidence.dtype == torch.float64
            self.again = Logarithmic(part) if wide else Sweep(part.double())
            log_evidence[self.rows] = self.again.log_evidence.to(log_evidence.dtype)
        self.log_evidence: Tensor = self._restored(log_evidence, 0)  # [B] nats

    def _restored(self, tensor: Tensor, axis: int) -> Tensor:
        """`tensor` with the sequences along `axis` in the caller's order."""
        return tensor if self.inverse is None else tensor.index_select(axis, self.inverse)

    def run_backward(self, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """γ [T, B, K], and Σ w_b ξ_t over what log_transition shares, in its shape; weights [B], 1 when None."""
        if weights is not None and self.order is not None:
            weights = weights[self.order]
        unary, counts = self.scaled.run_backward(weights)
        if self.again is not None:
            part = None if weights is None else weights[self.rows]
            again, extra = self.again.run_backward(part)
            unary[:, self.rows] = again.to(unary.dtype)
            if self.chain.shared:
                counts += extra
            else:
                counts[self.rows] = extra.to(counts.dtype)
        return self._restored(unary, 1), counts if self.chain.shared else self._restored(counts, 0)

    def pairwise(self, unary: Tensor, t: int) -> Tensor:
        """ξ_t(j, k) = p(z_t = j, z_{t+1} = k | x) from γ, t from 0: [B, K, K]; 0 where t + 1 is beyond the length."""
        sorted_unary = unary if self.order is None else unary[:, self.order]
        pair = self.scaled.pairwise(sorted_unary, t)
        if self.again is not None:
            pair[self.rows] = self.again.pairwise(sorted_unary[:, self.rows], t).to(pair.dtype)
        return self._restored(pair, 0)

    def draw(self, t: int, uniform: Tensor, following: Tensor) -> Tensor:
        """z_t given z_{t+1} = following from `uniform`, [S, B] each in the caller's order."""
        if self.order is not None:
            uniform, following = uniform[:, self.order], following[:, self.order]
        states = self.scaled.draw(t, uniform, following)
        if self.again is not None:
            states[:, self.rows] = self.again.draw(t, uniform[:, self.rows], following[:, self.rows])
        return self._restored(states, 1)

    def sample(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        """z_T ~ α_T, then z_t ~ p(z_t | z_{t+1}, x) backwards: [S, B, T].

        0 beyond the lengths; of an impossible sequence the states mean nothing.
        """
        batch, steps, _ = self.chain.log_likelihood.shape
        device = self.chain.log_likelihood.device
        uniforms = torch.rand(
            (steps, num_samples, batch), dtype=torch.float64, device=device, generator=generator
        )
        states = torch.zeros(steps, num_samples, batch, dtype=torch.long, device=device)
        following = states[-1]
        for t in range(steps - 1, -1, -1):
            following = states[t] = self.draw(t, uniforms[t], following)
        if self.inverse is not None:
            valid = self.chain.valid()
            assert valid is not None
            states.masked_fill_(~valid[:, self.inverse].unsqueeze(1), 0)
        return states.permute(1, 2, 0).contiguous()
