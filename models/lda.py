"""Latent Dirichlet allocation (Blei, Ng & Jordan 2003), smoothed, on the distinct terms of each document.

    φ_k ~ Dirichlet(η)            topics k = 1 … K, over terms
    θ_n ~ Dirichlet(α)            documents n = 1 … N, over topics
    z_nu ~ Categorical(θ_n)       the topic of each occurrence of a term,
    w_nu ~ Categorical(φ_{z_nu})  c_nu of them

All occurrences of one term in one document are alike, so a cell (n, u) stands for c_nu of them: its log-factors count
c_nu times. Nothing of size N × V × K is built.

Shapes: N documents, U cells a document (padded), V terms, K topics.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


def lda(
    terms: Tensor,
    counts: Tensor,
    *,
    num_topics: int,
    num_terms: int | None = None,
    alpha: float = 0.1,
    eta: float = 0.1,
) -> None:
    """Documents as terms [N, U], their numbers, and counts [N, U], how often each occurs (0 for padding).

    num_terms: V (default: the largest term + 1). alpha, eta: concentrations, the same for all topics and terms.

    Latent: `topics` φ [K, V]; `proportions` θ [N, K]; `z` [N, U]. Observed: `w`. There are no parameters.
    """
    if num_topics < 1:
        raise ValueError(f"num_topics must be at least 1, got {num_topics}")
    dtype = torch.get_default_dtype()
    vocabulary = num_terms or int(terms.max()) + 1
    weight = counts.to(dtype).clamp_min(
        torch.finfo(dtype).tiny
    )  # a scale must be positive; padding weighs nothing
    with pyro.plate("topic", num_topics):
        topics = pyro.sample("topics", dist.Dirichlet(torch.full((vocabulary,), eta)))
    with pyro.plate("data", len(terms), dim=-2):
        proportions = pyro.sample("proportions", dist.Dirichlet(torch.full((num_topics,), alpha)))
        with pyro.plate("cells", terms.shape[1], dim=-1), pyro.poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Categorical(proportions), infer={"enumerate": "parallel"})
            pyro.sample("w", dist.Categorical(topics[z]), obs=terms)
