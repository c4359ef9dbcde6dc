"""Variational families over enumerated sites: expectations of chains, coordinate ascent, and EM as a special case."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.compare import kl_per_datum
from lvmppl.distributions import MarkovChain

Y = torch.tensor([[0.3, -1.2, 2.0, 0.7], [1.5, 0.1, -0.4, 0.0]], dtype=torch.float64)
LENGTHS = torch.tensor([4, 3])
MOVE_A = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
MOVE_B = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
LOC = torch.tensor([[-1.0, 0.2, 1.1], [0.4, 1.3, 2.2]], dtype=torch.float64)


def factorial(y: Tensor, lengths: Tensor | None = None) -> None:
    """Two chains of 2 and 3 states that meet in y_t ~ Normal(loc[a_t, b_t], 0.8)."""
    loc = pyro.param("loc", LOC.clone())
    steps = y.shape[1]
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", MarkovChain(torch.tensor([0.4, 0.6]), MOVE_A, steps, lengths), infer=ENUMERATE)
        b = pyro.sample("b", MarkovChain(torch.ones(3), MOVE_B, steps, lengths), infer=ENUMERATE)
        fn = dist.Normal(loc[a, b], 0.8)
        if lengths is not None:
            fn = fn.expand(torch.broadcast_shapes(fn.batch_shape, y.shape)).mask(
                torch.arange(steps) < lengths.unsqueeze(-1)
            )
        pyro.sample("y", fn.to_event(1), obs=y)


ENUMERATE: dict[str, Any] = {"enumerate": "parallel"}


def simplexes(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).add(0.1).softmax(-1)


def chains_guide(y: Tensor, lengths: Tensor | None = None) -> None:
    steps, size = y.shape[1], len(y)
    with pyro.plate("data", size):
        for name, k, seed in (("a", 2, 1), ("b", 3, 2)):
            start = pyro.param(
                f"{name}_initial", simplexes(size, k, seed=seed), constraint=constraints.simplex, event_dim=1
            )
            moves = pyro.param(
                f"{name}_transition",
                simplexes(size, steps - 1, k, k, seed=seed + 5),
                constraint=constraints.positive,
                event_dim=3,
            )
            pyro.sample(name, MarkovChain(start, moves, steps, lengths), infer=ENUMERATE)


def brute_force_elbo(loc: np.ndarray, lambda_: dict[str, np.ndarray], lengths: list[int]) -> float:
    """Σ over all sequences of both chains, one by one."""
    total = 0.0
    pi = {"a": np.array([0.4, 0.6]), "b": np.ones(3) / 3}
    move = {"a": MOVE_A.numpy(), "b": MOVE_B.numpy()}
    for n, T in enumerate(lengths):
        tables: dict[str, list[tuple[tuple[int, ...], float, float]]] = {}
        for name, k in (("a", 2), ("b", 3)):
            q0 = lambda_[f"{name}_initial"][n]
            qm = lambda_[f"{name}_transition"][n]
            qm = qm / qm.sum(-1, keepdims=True)
            tables[name] = []
            for z in itertools.product(range(k), repeat=T):
                log_q = math.log(q0[z[0]] / q0.sum())
                log_p = math.log(pi[name][z[0]])
                for t in range(T - 1):
                    log_q += math.log(qm[t, z[t], z[t + 1]])
                    log_p += math.log(move[name][z[t], z[t + 1]])
                tables[name].append((z, log_q, log_p))
        for (za, qa, pa), (zb, qb, pb) in itertools.product(tables["a"], tables["b"]):
            residual = Y.numpy()[n, :T] - loc[list(za), list(zb)]
            likelihood = float((-0.5 * (residual / 0.8) ** 2 - math.log(0.8 * math.sqrt(2 * math.pi))).sum())
            total += math.exp(qa + qb) * (pa + pb + likelihood - qa - qb)
    return total


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_elbo_of_chains_equals_brute_force(lengths: Tensor | None) -> None:
    data = {"y": Y} if lengths is None else {"y": Y, "lengths": lengths}
    fit = lvmppl.fit(factorial, data, algorithm="svi", guide=chains_guide, max_steps=3, learning_rate=0.05)
    lambda_ = {k: v.numpy() for k, v in fit.guide_parameters.items()}
    sizes = [4, 4] if lengths is None else lengths.tolist()
    expected = brute_force_elbo(fit.parameters["loc"].numpy(), lambda_, sizes)
    assert fit.elbo == pytest.approx(expected, rel=1e-10)
    assert fit.elbo < fit.log_evidence


def test_divergence_of_chains_does_not_count_what_stands_outside_of_the_data() -> None:
    """KL[q ‖ p(z | x)] per sequence against the sum over its states; the observation outside changes nothing."""
    start, moves = torch.tensor([0.6, 0.4], dtype=torch.float64), MOVE_A
    q = torch.tensor([[0.2, 0.8], [0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    x = torch.tensor([[0.3, 1.9, 0.1], [2.2, -0.4, 1.0]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        pyro.sample("outside", dist.Normal(0.0, 1.0), obs=torch.tensor(1.7, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", MarkovChain(start, moves, 3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2.0 * z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        table = pyro.param("table", q, constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            chain = MarkovChain(table[0], table[1:].unsqueeze(1).expand(2, 2, 2), 3)
            pyro.sample("z", chain, infer={"enumerate": "parallel"})

    fit = lvmppl.fit(model, {"x": x}, "svi", guide=guide, max_steps=1)
    q = fit.guide_parameters["table"]
    assert fit.variational is not None and fit.posterior is not None
    for row, sequence in enumerate(x):
        log_p, log_q = [], []
        for z in itertools.product(range(2), repeat=3):
            path = start[z[0]].log() + moves[z[0], z[1]].log() + moves[z[1], z[2]].log()
            emitted = dist.Normal(2.0 * torch.tensor(z).double(), 1.0).log_prob(sequence).sum()
            log_p.append(path + emitted)
            log_q.append(sum(q[t, k].log() for t, k in enumerate(z)))
        p, own = torch.stack(log_p).log_softmax(0), torch.stack(log_q)
        found = kl_per_datum(fit.variational, fit.posterior)[row]
        torch.testing.assert_close(found, (own.exp() * (own - p)).sum(), rtol=1e-9, atol=1e-12)
