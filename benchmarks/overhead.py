"""What a step costs beyond the computation it runs: the loop of `svi` against the same arithmetic written by hand.

Prints the median of five paired runs, and the time of a step against plain Pyro's TraceEnum_ELBO on the same model and
guide. Run: python benchmarks/overhead.py
"""

from __future__ import annotations

import functools
import statistics
import time

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_iris

from lvmppl.algorithms import svi
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.stepper import batch_elbo
from lvmppl.density import Coordinates, isolated, unvalidated
from lvmppl.guides.categorical import categorical_encoder
from lvmppl.models.mixture import gaussian_mixture
from lvmppl.options import SVIOptions

STEPS = 400
model = functools.partial(gaussian_mixture, num_components=3)


def fitted(problem: object) -> float:
    """Seconds a step of the fit's own loop (the scoring after it is not a step)."""
    begin = time.perf_counter()
    svi.ascend(problem, SVIOptions(max_steps=STEPS, batch_size=50))  # type: ignore[arg-type]
    return (time.perf_counter() - begin) / STEPS


def by_hand(problem: object) -> float:
    """Seconds a step of the same ELBO, gradient and Adam update with nothing around them."""
    coordinates = Coordinates(problem.guided.specs, (*problem.theta, *problem.lambda_))  # type: ignore[attr-defined]
    leaves = {k: v.requires_grad_() for k, v in coordinates.unconstrain(problem.initial).items()}  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(leaves.values(), lr=0.01)
    batches = [torch.randperm(150)[:50] for _ in range(STEPS)]
    objectives = []
    begin = time.perf_counter()
    for indices in batches:
        optimizer.zero_grad()
        value = batch_elbo(problem, problem.guided, coordinates.constrain(leaves), indices)  # type: ignore[arg-type, attr-defined]
        objectives.append(float(value))
        (-value).backward()
        optimizer.step()
    return (time.perf_counter() - begin) / STEPS


def plain_pyro(x: torch.Tensor) -> float:
    """Seconds a step of pyro.infer.SVI with TraceEnum_ELBO, rows handed in, validation off."""
    pyro.clear_param_store()
    guide = categorical_encoder(model)
    with pyro.validation_enabled(False):
        guide(x=x)
        optimiser = SVI(model, lambda x: (pyro.module("guide", guide), guide(x=x)), Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
        batches = [x[torch.randperm(150)[:50]] for _ in range(STEPS)]
        optimiser.step(x=batches[0])
        begin = time.perf_counter()
        for batch in batches:
            optimiser.step(x=batch)
        return (time.perf_counter() - begin) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    x = torch.tensor(load_iris().data)
    with isolated(0, torch.float64):
        problem = build_problem("overhead", model, {"x": x}, guide=categorical_encoder, guide_takes_model=True)
        with unvalidated():
            fitted(problem), by_hand(problem)
            rows = [(fitted(problem), by_hand(problem), plain_pyro(x)) for _ in range(5)]
    extra = statistics.median(a - b for a, b, _ in rows) * 1e6
    print(f"step of a fit {statistics.median(r[0] for r in rows) * 1e6:8.0f} µs")
    print(f"  by hand     {statistics.median(r[1] for r in rows) * 1e6:8.0f} µs")
    print(f"  overhead    {extra:8.0f} µs   (median of five; at most 50)")
    print(f"  plain Pyro  {statistics.median(r[2] for r in rows) * 1e6:8.0f} µs   ratio {statistics.median(r[0] / r[2] for r in rows):.2f}")


if __name__ == "__main__":
    main()
