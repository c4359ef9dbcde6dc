"""A factorial hidden Markov model (Ghahramani & Jordan 1997): independent chains that meet in the observations.

    z^(l)_1 ─→ z^(l)_2 ─→ …      chains l = 1 … L, each with its own transition
    x_t ~ Normal(Σ_l W_l[z^(l)_t], σ²)

Shapes: N sequences, T steps, K states.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from lvmppl.distributions import MarkovChain


def factorial_hidden_markov(
    x: Tensor,
    lengths: Tensor | None = None,
    *,
    num_chains: int = 3,
    num_states: int = 4,
    stay: float = 0.9,
    scale: float = 0.5,
) -> None:
    """L chains of K states whose levels add up to x [N, T].

    lengths: [N] steps of each sequence, None when all have T; what stands beyond a length is not read.

    θ: `transition` [L, K, K]; `level` [L, K]; `scale`, the sd of what the chains leave. stay, scale: where these start.

    Latent: `z0` … `z{L−1}` [N, T], each one site for whole sequences. Observed: `x`.
    """
    if num_chains < 1 or num_states < 2:
        raise ValueError(f"num_chains must be at least 1 and num_states 2, got {num_chains} and {num_states}")
    steps = x.shape[1]
    eye = torch.eye(num_states, dtype=x.dtype)
    moves = stay * eye + (1 - stay) * (1 - eye) / (num_states - 1)
    spread = torch.arange(num_states, dtype=x.dtype) - (num_states - 1) / 2
    weight = torch.tensor([2.0**-i for i in range(num_chains)], dtype=x.dtype)
    transition = pyro.param("transition", moves.repeat(num_chains, 1, 1), constraint=constraints.simplex)
    level = pyro.param("level", weight.unsqueeze(-1) * spread)
    sd = pyro.param("scale", torch.tensor(scale, dtype=x.dtype), constraint=constraints.positive)
    initial = torch.full((num_states,), 1 / num_states, dtype=x.dtype)
    mean: Tensor | float = 0.0
    with pyro.plate("data", len(x)):
        for i in range(num_chains):
            chain = MarkovChain(initial, transition[i], steps, lengths)
            mean = mean + level[i][pyro.sample(f"z{i}", chain, infer={"enumerate": "parallel"})]
        fn = dist.Normal(mean, sd)
        if lengths is not None:
            fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, x.shape))
            fn = fn.mask(torch.arange(steps) < lengths.unsqueeze(-1))
        pyro.sample("x", fn.to_event(1), obs=x)
