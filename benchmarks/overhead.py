"""What a step costs beyond the computation it runs: the loop of `svi` against the same steps written by hand.

Both loops draw batches, evaluate an objective, log it, take its gradient and an Adam step. For the overhead the
objective is a stand-in of a few microseconds, so that the difference is not lost in the noise of the ELBO; then a step
with the real ELBO is timed against plain Pyro's TraceEnum_ELBO on the same model and guide.
Prints medians of five paired runs, in processor time so that other programs do not count, and exits with 1 when the
overhead is above the limit. Run: python benchmarks/overhead.py
"""

from __future__ import annotations

import functools
import statistics
import sys
import time

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam
from sklearn.datasets import load_iris

from lvmppl.algorithms import svi
from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import build_problem
from lvmppl.algorithms.surrogate import Estimate
from lvmppl.density import Coordinates, isolated, unvalidated
from lvmppl.guides.categorical import categorical_encoder
from lvmppl.models.mixture import gaussian_mixture
from lvmppl.options import SVIOptions

STEPS = 400
LIMIT = 50  # µs a step
real_objective = Objective.__call__


def stand_in(problem, joint, values, indices, particles=1):  # type: ignore[no-untyped-def]
    """A cheap concave function of every free parameter."""
    return -torch.stack([v.square().sum() for v in values.values() if v.requires_grad]).sum()


def stand_in_estimate(objective, values, indices, step):  # type: ignore[no-untyped-def]
    """The same as what a fit asks for."""
    value = stand_in(None, None, values, indices)
    return Estimate(value.detach(), value)


model = functools.partial(gaussian_mixture, num_components=3)


def fitted(problem: object) -> float:
    """Seconds a step of the fit's own loop (what comes before and the scoring after it are no steps)."""
    ascent = svi._Ascent(problem, SVIOptions(max_steps=STEPS, batch_size=50), 0)  # type: ignore[arg-type]
    begin = time.process_time()
    ascent.run()
    return (time.process_time() - begin) / STEPS


def by_hand(problem: object, objective: object) -> float:
    """Seconds a step of the same ELBO, gradient and Adam update with nothing around them."""
    coordinates = Coordinates(problem.guided.specs, (*problem.theta, *problem.lambda_))  # type: ignore[attr-defined]
    leaves = {k: v.requires_grad_() for k, v in coordinates.unconstrain(problem.initial).items()}  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(leaves.values(), lr=0.01)
    objectives: list[float] = []
    batches: list[torch.Tensor] = []
    begin = time.process_time()
    for _ in range(STEPS):
        if not batches:
            batches = list(torch.randperm(150).split(50))
        indices = batches.pop()
        optimizer.zero_grad()
        value = objective(problem, problem.guided, coordinates.constrain(leaves), indices)  # type: ignore[operator, attr-defined]
        objectives.append(float(value.detach()))
        (-value).backward()
        optimizer.step()
    return (time.process_time() - begin) / STEPS


def plain_pyro(x: torch.Tensor) -> float:
    """Seconds a step of pyro.infer.SVI with TraceEnum_ELBO, rows handed in, validation off."""
    pyro.clear_param_store()
    guide = categorical_encoder(model)
    with pyro.validation_enabled(False):
        guide(x=x)
        optimiser = SVI(
            model,
            lambda x: (pyro.module("guide", guide), guide(x=x)),
            Adam({"lr": 0.01}),
            TraceEnum_ELBO(max_plate_nesting=1),
        )
        batches = [x[torch.randperm(150)[:50]] for _ in range(STEPS)]
        optimiser.step(x=batches[0])
        begin = time.process_time()
        for batch in batches:
            optimiser.step(x=batch)
        return (time.process_time() - begin) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    x = torch.tensor(load_iris().data)
    with isolated(0, torch.float64):
        problem = build_problem(
            "overhead", model, {"x": x}, guide=categorical_encoder, guide_takes_model=True
        )
        with unvalidated():
            Objective.__call__ = stand_in_estimate  # type: ignore[method-assign]
            pairs = [(fitted(problem), by_hand(problem, stand_in)) for _ in range(6)][1:]
            Objective.__call__ = real_objective  # type: ignore[method-assign]
            rows = [(fitted(problem), plain_pyro(x)) for _ in range(5)]
    loop, hand = (statistics.median(p[i] for p in pairs) * 1e6 for i in range(2))
    extra = statistics.median(a - b for a, b in pairs) * 1e6
    step, pyro_step = (statistics.median(r[i] for r in rows) * 1e6 for i in range(2))
    ratio = statistics.median(r[0] / r[1] for r in rows)
    print(f"loop of a fit, stand-in objective {loop:7.0f} µs a step")
    print(f"the same steps by hand            {hand:7.0f} µs a step")
    verdict = "OVER the limit of" if extra > LIMIT else "at most"
    print(f"overhead                          {extra:7.0f} µs a step ({verdict} {LIMIT})")
    print(f"step with the real ELBO           {step:7.0f} µs")
    print(f"plain Pyro, TraceEnum_ELBO        {pyro_step:7.0f} µs, ratio {ratio:.2f}")
    if extra > LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
