"""The variance and bias of every gradient estimator, measured on two models small enough to know the gradient.

`states`: 20 data with one of four states each, q a table of probabilities; the exact gradient is the sum over states.
`line`: 20 data x ~ N(z, 0.7²), z ~ N(0, 1), q Gaussian with a table of means and scales; the exact gradient is in closed
form. Both at a λ off the optimum. Variance is the trace of the covariance of ∇_λ (unconstrained) over independent steps,
bias the norm of mean − exact with the standard error of that mean, both in units of the exact gradient: its squared norm
and its norm. Run: python benchmarks/estimator_variance.py [--write], which puts the table into docs/estimators.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from lvmppl.algorithms.objective import Objective
from lvmppl.algorithms.problem import build_problem
from lvmppl.density import isolated
from lvmppl.options import SVIOptions

STEPS, WARM = 2000, 100  # steps measured, after those from which baselines learn
N, K = 20, 4
PAGE = Path(__file__).parent.parent / "docs" / "estimators.md"


def states(x: Tensor) -> None:
    loc = torch.linspace(-2, 2, K)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.OneHotCategorical(torch.ones(K) / K), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z @ loc, 1.0), obs=x)


def states_table(x: Tensor) -> None:
    start = torch.sin(torch.arange(N * K, dtype=x.dtype)).reshape(N, K)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.OneHotCategorical(logits=pyro.param("logits", start, event_dim=1)))


def states_elbo(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    log_q = torch.log_softmax(values["logits"], -1)
    log_p = dist.Normal(torch.linspace(-2, 2, K), 1.0).log_prob(x.unsqueeze(-1)) + torch.ones(K).div(K).log()
    return (log_q.exp() * (log_p - log_q)).sum()


def line(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def line_table(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", torch.zeros(N), event_dim=0)
        log_scale = pyro.param("log_scale", torch.zeros(N), event_dim=0)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def line_elbo(values: Mapping[str, Tensor], x: Tensor) -> Tensor:
    m, s = values["loc"], values["log_scale"].exp()
    kl = 0.5 * (m.square() + s.square() - 1) - s.log()
    return (-((x - m).square() + s.square()) / (2 * 0.49) - kl).sum()


MODELS = {"states": (states, states_table, states_elbo), "line": (line, line_table, line_elbo)}
BASELINES = ("none", "running_mean", "learned", "leave_one_out")
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("states", "enumeration", {}),
    *(
        ("states", f"score_function, {b}", {"estimator": {"use": "score_function", "baseline": b}})
        for b in BASELINES
    ),
    *(
        (
            "states",
            f"{name}, temperature {t:g}",
            {"estimator": {"use": name, "temperature": {"start": t, "end": t}}},
        )
        for name, t in (("gumbel_softmax", 1.0), ("gumbel_softmax", 0.2), ("straight_through", 1.0))
    ),
    ("line", "pathwise", {}),
    *(
        ("line", f"score_function, {b}", {"estimator": {"use": "score_function", "baseline": b}})
        for b in BASELINES
    ),
]


def measure(name: str, options: dict[str, Any], particles: int) -> tuple[float, float, float]:
    """(variance, bias, standard error of the bias), relative to the exact gradient."""
    model, guide, elbo = MODELS[name]
    with isolated(0, torch.float64):
        x = 2 * torch.cos(torch.arange(N, dtype=torch.float64))
        problem = build_problem("fit", model, {"x": x}, guide=guide)
        objective = Objective(problem, SVIOptions(num_particles=particles, **options))
        leaves = {n: v.clone().requires_grad_() for n, v in problem.initial.items()}
        flat = list(leaves.values())
        exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(elbo(leaves, x), flat)])
        rows = []
        for _ in range(WARM + STEPS):
            found = torch.autograd.grad(objective(leaves, None, 0).surrogate, flat)
            rows.append(torch.cat([g.reshape(-1) for g in found]))
    drawn = torch.stack(rows[WARM:])
    variance, size = float(drawn.var(0).sum()), float(exact.norm())
    bias = float((drawn.mean(0) - exact).norm())
    return variance / size**2, bias / size, (variance / STEPS) ** 0.5 / size


def main() -> None:
    torch.set_num_threads(1)
    lines = [
        "| model | estimator | variance, J = 1 | variance, J = 8 | bias, J = 8 |",
        "|---|---|---|---|---|",
    ]
    for name, label, options in CASES:
        several = measure(name, options, 8)
        first = "–" if "leave_one_out" in label else f"{measure(name, options, 1)[0]:.3g}"
        bias = f"{several[1]:.3f} (± {several[2]:.3f})"
        lines.append(f"| {name} | {label} | {first} | {several[0]:.3g} | {bias} |")
        print(lines[-1], flush=True)
    if "--write" in sys.argv:
        page, table = PAGE.read_text(encoding="utf-8"), "\n".join(lines)
        marks = "<!-- measured -->\n", "\n<!-- end -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        page = re.sub(pattern, lambda _: marks[0] + table + marks[1], page, flags=re.S)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
