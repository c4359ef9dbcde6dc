"""A step of svi, and a round of vem, on a table with a row per datum: time and memory against the number of rows.

x⁽ⁿ⁾ ~ Normal(z⁽ⁿ⁾, ½), z⁽ⁿ⁾ ~ Normal(θ, 1), q(z⁽ⁿ⁾) = Normal(loc⁽ⁿ⁾, scale⁽ⁿ⁾): two tables of N rows, batches of 1000.
What is kept (data, tables, moments, tail average) grows with N; what a step takes must not. Each N runs in a process of
its own. Prints two rows for each N: milliseconds a step or round (of one E and one M step; median of 200), resident memory
before them, and by how much their peak exceeded it (Linux only: the kernel's high-water mark is reset in between).
Run: python benchmarks/table_rows.py [N ...]
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.problem import Problem, build_problem
from lvmppl.algorithms.recovery import Recovery
from lvmppl.algorithms.svi import _Ascent
from lvmppl.algorithms.vem import _Alternation, _round
from lvmppl.density import isolated, unvalidated
from lvmppl.guides.variational import mean_field
from lvmppl.options import SVIOptions, VEMOptions

SIZES = (10_000, 100_000, 1_000_000)
BATCH, STEPS = 1000, 200


def model(x: Tensor) -> None:
    mean = pyro.param("mean", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def resident(field: str) -> float:
    """Resident memory of this process in MiB: `VmRSS` now, `VmHWM` at its highest since the mark was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def steps_of(algorithm: str, problem: Problem) -> Callable[[int], object]:
    """One step of svi or round of vem, within the tail that is averaged."""
    options: dict[str, Any] = {"batch_size": BATCH, "max_steps": 10 * STEPS}
    if algorithm == "svi":
        ascent = _Ascent(problem, SVIOptions(**options), 0)
        ascent.stepper.average.begin(ascent.stepper.leaves)
        return lambda step: ascent._step(step, ascent.batches.next())
    rounds = VEMOptions(**options, e_steps=1, m_steps=1)
    state = _Alternation(closed_phases(problem, rounds), rounds, 0)
    state.begin_average()
    trajectory, recovery = Trajectory(0, state.bound.kind), Recovery()
    return lambda step: _round(state, trajectory, recovery, step)


def measure(algorithm: str, count: int) -> str:
    """One line of the table."""
    with isolated(0, torch.float64), unvalidated():
        x = 1.0 + torch.randn(count)
        problem = build_problem("a", model, {"x": x}, guide=mean_field, guide_takes_model=True)
        take = steps_of(algorithm, problem)
        for step in range(20):
            take(step)
        Path("/proc/self/clear_refs").write_text("5")
        before, seconds = resident("VmRSS"), []
        for step in range(20, 20 + STEPS):
            begin = time.perf_counter()
            take(step)
            seconds.append(time.perf_counter() - begin)
        added = resident("VmHWM") - before
    return (
        f"{algorithm}  {count:>9,}  {1000 * statistics.median(seconds):8.2f}  {before:14.1f}  {added:15.1f}"
    )


def main() -> None:
    sizes = [int(a.replace("_", "")) for a in sys.argv[1:]] or SIZES
    print("          rows   ms/step  resident (MiB)  steps add (MiB)")
    for algorithm, size in itertools.product(("svi", "vem"), sizes):
        code = f"import table_rows; print(table_rows.measure({algorithm!r}, {size}))"
        line = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
        )
        print(line.stdout.rstrip() or line.stderr)


if __name__ == "__main__":
    main()
