"""A model with one latent number a row, and a guide that is a table of its moments."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


def local_normal(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def table_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", torch.zeros(len(x)), event_dim=0)
        scale = pyro.param("scale", torch.ones(len(x)), constraint=constraints.positive, event_dim=0)
        pyro.sample("z", dist.Normal(loc, scale))
