"""Minibatches: the rows that model and guide speak of, what a step costs, and what comes back of a noisy ascent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from allocations import Allocations
from scipy.stats import chi2, norm
from table_models import local_normal, table_guide
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.algorithms.ascent import Trajectory
from lvmppl.algorithms.closed_phases import closed_phases
from lvmppl.algorithms.problem import Silent, build_problem
from lvmppl.algorithms.recovery import Recovery
from lvmppl.algorithms.stepper import Stepper, batch_elbo
from lvmppl.algorithms.svi import _Ascent
from lvmppl.algorithms.vem import _Alternation, _round
from lvmppl.density import isolated, unvalidated
from lvmppl.errors import ModelError
from lvmppl.guides.categorical import categorical
from lvmppl.options import SVIOptions, VEMOptions


def values(count: int) -> Tensor:
    return torch.tensor(np.random.default_rng(count).normal(1.0, 1.1, count))


# ----------------------------------------------------------------------------- the same rows in model and guide


def fixed_plate(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", 30):
        pyro.sample("z", dist.Normal(loc, 1.0))


def own_subsample(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(30))
    with pyro.plate("data", len(x), subsample_size=min(6, len(x))) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 1.0))


def by_place(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(30))
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("z", dist.Normal(loc[rows], 1.0))


@pytest.mark.parametrize("algorithm", ["svi", "vem"])
@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (fixed_plate, r"guide: plate 'data': expected the size of the data, 6, got 30; write pyro.plate"),
        (own_subsample, r"guide: plate 'data': expected the size of the data, 30, got 6; write pyro.plate"),
        (by_place, r"parameter 'loc': expected a row per datum inside plate 'data'.*event_dim"),
    ],
)
def test_guide_that_speaks_of_other_rows_than_the_model_is_refused(
    guide: Any, words: str, algorithm: str
) -> None:
    with pytest.raises(ModelError, match=words):
        lvmppl.fit(local_normal, {"x": values(30)}, algorithm, guide=guide, batch_size=6, max_steps=2)


def test_model_with_a_plate_of_its_own_size_is_refused() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:1])

    def guide(x: Tensor) -> None:
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(ModelError, match="model: plate 'data': expected the size of the data, 6, got 30"):
        lvmppl.fit(model, {"x": values(30)}, "svi", guide=guide, batch_size=6, max_steps=2)


def test_model_that_a_replay_would_hide_behind_the_guides_rows_is_refused() -> None:
    """Under replay the model's plate takes the guide's rows, and a scale of 30 / 6 that nobody asked for."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 30):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ModelError, match="model: plate 'data': expected the size of the data, 6, got 30"):
        lvmppl.fit(model, {"x": values(30)}, "svi", guide=table_guide, batch_size=6, max_steps=2)


def test_other_plate_must_have_the_models_size_in_the_guide() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("topics", 1):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu.sum(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("topics", 4):
            pyro.sample("mu", dist.Normal(loc, 1.0))

    with pytest.raises(ModelError, match=r"plate 'topics'.*size in the guide, 1, got 4"):
        lvmppl.fit(model, {"x": values(5)}, "svi", guide=guide, max_steps=2)


def test_shared_parameter_that_happens_to_have_as_many_rows_as_the_data_is_no_table() -> None:
    def guide(x: Tensor) -> None:
        weights = pyro.param("weights", torch.zeros(30))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(weights.sum() + 0 * x, 1.0))

    fit = lvmppl.fit(local_normal, {"x": values(30)}, "svi", guide=guide, batch_size=6, max_steps=2)
    assert fit.status == "max_steps"


# --------------------------------------------------------------------------------------- what a step costs


def largest_allocation_of_a_step(count: int, optimizer: Any = "adam") -> int:
    """Of steps before, at and within the tail that is averaged, after the first has made what is kept."""
    options = SVIOptions(batch_size=10, max_steps=count // 2, optimizer=optimizer)
    with isolated(0, torch.float64), unvalidated():
        problem = build_problem("a", local_normal, {"x": values(count)}, guide=table_guide)
        ascent = _Ascent(problem, options, 0)
        ascent._step(0, ascent.batches.next())
        with Allocations() as seen:
            ascent._step(1, ascent.batches.next())
        ascent.stepper.average.begin(ascent.stepper.leaves)  # once a fit
        with seen:
            for step in range(2, 5):
                ascent._step(step, ascent.batches.next())
        for name in ("loc", "scale"):
            table = ascent.stepper.leaves[name]
            assert len(table) == count and not table.requires_grad and table.grad is None
    return seen.largest


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_memory_of_a_step_on_a_table_is_that_of_its_batch(optimizer: str) -> None:
    small, large = (largest_allocation_of_a_step(n, optimizer) for n in (400, 40_000))
    assert small == large
    assert 0 < large <= 10 * 8 * 8  # a few numbers of float64 for each of the 10 rows


def largest_allocation_of_a_round(count: int) -> int:
    """Of rounds of vem, each of three E and two M steps on batches of 10, before and within the tail."""
    options = VEMOptions(batch_size=10, max_steps=count // 2, e_steps=3, m_steps=2)
    with isolated(0, torch.float64), unvalidated():
        problem = build_problem("a", local_normal, {"x": values(count)}, guide=table_guide)
        state = _Alternation(closed_phases(problem, options), options, 0)
        trajectory, recovery = Trajectory(0, state.bound.kind), Recovery()
        _round(state, trajectory, recovery, 0)
        with Allocations() as seen:
            _round(state, trajectory, recovery, 1)
        state.begin_average()  # once a fit
        with seen:
            for step in (2, 3):
                _round(state, trajectory, recovery, step)
        assert len(state.e_step.leaves["loc"]) == count
        assert int((state.e_step.leaves["loc"] != 0).sum()) > 0
    return seen.largest


def test_memory_of_a_round_of_vem_on_a_table_is_that_of_its_batch() -> None:
    small, large = (largest_allocation_of_a_round(n) for n in (400, 40_000))
    assert small == large
    assert 0 < large <= 10 * 8 * 8


def test_m_step_on_a_batch_climbs_at_the_rows_that_the_e_steps_left() -> None:
    """With λ at the posterior the gradient of θ is Σ (E z − θ): θ moves to the mean of E z over all rows."""
    x = values(40)
    options: dict[str, Any] = {"batch_size": 10, "max_steps": 150, "e_steps": 10, "m_steps": 2}
    fit = lvmppl.fit(local_normal, {"x": x}, "vem", guide=table_guide, learning_rate=0.05, **options)
    # x ~ Normal(θ, 1 + ¼): the maximum likelihood of θ is the mean of x
    assert float(fit.parameters["mean"]) == pytest.approx(float(x.mean()), abs=0.02)
    assert float(fit.guide_parameters["loc"].mean()) == pytest.approx(float(x.mean()), abs=0.02)


def test_undone_step_restores_rows_moments_and_halves_the_rate() -> None:
    with isolated(0, torch.float64), unvalidated():
        problem = build_problem("a", local_normal, {"x": values(9)}, guide=table_guide)
        names = (*problem.free_theta, *problem.free_lambda)
        stepper = Stepper(problem, problem.initial, names, "adam", 0.1, None, minibatches=True)
        assert problem.guided is not None

        def step(indices: Tensor) -> None:
            at, rows = stepper.values(indices)
            value = batch_elbo(problem, problem.guided, at, indices)  # type: ignore[arg-type]
            stepper.update(value, rows, indices, 1.0)

        def state() -> list[Tensor]:
            kept = [stepper.leaves[n].detach().clone() for n in names]
            return [*kept, *(v.clone() for s in stepper.sparse.values() for v in s.state.values())]

        step(torch.tensor([0, 3, 4]))
        before, batch = state(), torch.tensor([3, 8])
        stepper.save()
        step(batch)
        assert not all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
        stepper.restore()
        for old, new in zip(before, state(), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        assert stepper.rate == 0.05


# --------------------------------------------------------------------------------------- noisy ascents


def mean_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.1), obs=x)


def mean_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(0.1), constraint=constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


class Iterates(Silent):
    """λ of every step, read while the fit runs."""

    def __init__(self) -> None:
        self.ascent: _Ascent | None = None
        self.loc: list[float] = []

    def update(self, step: int, objective: float) -> None:
        assert self.ascent is not None
        self.loc.append(float(self.ascent.stepper.leaves["loc"].detach()))


def watched(seed: int, **options: Any) -> tuple[Iterates, Trajectory]:
    """An ascent on minibatches of 10, and every iterate of it."""
    seen = Iterates()
    with isolated(seed, torch.float64), unvalidated():
        data = {"x": values(200)}
        problem = build_problem("a", mean_model, data, guide=mean_guide, progress=seen, seed=seed)
        seen.ascent = _Ascent(problem, SVIOptions(batch_size=10, learning_rate=0.05, **options), 0)
        return seen, seen.ascent.run()


# Plain gradient ascent on a Gaussian posterior, its q at a fixed sd, is linear: with δ the distance of q's mean from the
# posterior's, P its precision, L = N/σ² the part of it that comes from draws z = loc + s ε, and η_t the rate,
#     δ_{t+1} = (1 − η_t P) δ_t − η_t L s ε_t,
# a Gaussian process whose variances, and those of its sums, are known at every step.

COLUMNS, DATA, SPREAD, WIDE, STEPS = 60, 20, 1.1, 5.0, 1600
PRECISION = 1 / WIDE**2 + DATA / SPREAD**2
POSTERIOR_SD = PRECISION**-0.5


def columns_model(x: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(torch.zeros(COLUMNS), WIDE).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, SPREAD).to_event(1), obs=x)


def columns_guide(x: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(COLUMNS))
    pyro.sample("mu", dist.Normal(loc, POSTERIOR_SD).to_event(1))


class Means(Silent):
    """q's mean at every step, read while the fit runs."""

    def __init__(self) -> None:
        self.ascent: _Ascent | None = None
        self.loc: list[np.ndarray[Any, Any]] = []

    def update(self, step: int, objective: float) -> None:
        assert self.ascent is not None
        self.loc.append(self.ascent.stepper.leaves["loc"].detach().numpy().copy())


def predicted(schedule: str, gain: float, tail: int) -> tuple[np.ndarray[Any, Any], float]:
    """(variance of δ_t at each of the tail's steps, variance of their mean), in posterior variances."""
    cov, found = np.zeros((2, 2)), []  # of δ and of the sum over the tail
    for t in range(STEPS + 1):
        if t >= tail:
            found.append(cov[0, 0])
            add = np.array([[1.0, 0.0], [1.0, 1.0]])
            cov = add @ cov @ add.T
        factor = {"constant": 1.0, "linear": 1.0 - t / STEPS}[schedule]
        pull, noise = gain * factor, gain * factor * (DATA / SPREAD**2) / PRECISION
        move = np.diag([1.0 - pull, 1.0])
        cov = move @ cov @ move.T
        cov[0, 0] += noise**2
    return np.array(found), float(cov[1, 1]) / len(found) ** 2


def errors_of_a_fit(schedule: str, gain: float) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(iterate − posterior mean over the tail [M, D], the same of what the fit returns [D]), in posterior sds."""
    x = torch.tensor(np.random.default_rng(7).normal(1.0, SPREAD, (DATA, COLUMNS)))
    exact = x.sum(0).numpy() / SPREAD**2 / PRECISION
    seen, rate = Means(), gain / PRECISION
    options = SVIOptions(optimizer="sgd", learning_rate=rate, schedule=schedule, max_steps=STEPS)
    with isolated(0, torch.float64), unvalidated():
        problem = build_problem("a", columns_model, {"x": x}, guide=columns_guide, progress=seen)
        seen.ascent = _Ascent(problem, options, 0)
        found = seen.ascent.run().values["loc"].numpy()
        assert "KL in closed form" in seen.ascent.objective.report()  # so the prior's pull has no noise
    tail = np.array(seen.loc[int(0.75 * STEPS) :])
    np.testing.assert_allclose(found, tail.mean(0), rtol=1e-10)
    return (tail - exact) / POSTERIOR_SD, (found - exact) / POSTERIOR_SD


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_tail_average_has_the_small_variance_and_late_iterates_the_large_one_of_their_linear_process(
    schedule: str,
) -> None:
    """At η P = 0.9 theory has 74 % of a constant rate's iterates off by 0.3 posterior sd, and their mean by 0.05.

    A rate that decays to zero ends within 0.11.
    """
    gain, tail = 0.9, int(0.75 * STEPS)
    variance, of_mean = predicted(schedule, gain, tail)
    late, returned = errors_of_a_fit(schedule, gain)
    if schedule == "constant":
        share = 2 * norm.sf(0.3 / variance**0.5).mean()
        assert share == pytest.approx(0.74, abs=0.01) and of_mean**0.5 == pytest.approx(0.05, abs=0.002)
        spread = 4 * (share * (1 - share) / late.size) ** 0.5
        assert abs((np.abs(late) > 0.3).mean() - share) < spread * 1.1  # neighbours correlate by 0.1
    else:
        assert variance[-2] ** 0.5 < 0.11
    low, high = chi2.ppf([1e-4, 1 - 1e-4], COLUMNS)
    assert low < (returned**2).sum() / of_mean < high
    last = late[-2] if schedule == "linear" else late[-1]
    assert low < (last**2).sum() / variance[-2 if schedule == "linear" else -1] < high
    whole = (late**2 / variance[:, None])[variance > 0]
    assert whole.mean() == pytest.approx(1.0, abs=0.1 if schedule == "linear" else 0.05)


def test_patience_returns_the_mean_iterate_of_the_window_with_the_best_smoothed_objective() -> None:
    seen, found = watched(0, max_steps=4000, schedule="constant", patience=2)
    assert found.status == "converged" and found.steps < 3000
    objective = np.array([row["objective"] for row in found.rows])
    windows = objective.reshape(-1, 50).mean(1)
    best = int(windows.argmax())
    assert best == len(windows) - 1 - 2
    assert float(found.values["loc"]) == pytest.approx(
        float(np.mean(seen.loc[50 * best : 50 * best + 50])), rel=1e-12
    )


def test_best_restart_of_vem_is_kept() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 0.5, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 0.3), obs=x)

    options: dict[str, Any] = {"guide": categorical, "init": "random", "restarts": 6, "max_steps": 4}
    x = values(50) + 4.0 * torch.arange(5).repeat(10)  # three means share five clusters in more than one way
    fit = lvmppl.fit(model, {"x": x}, "vem", **options)
    best = fit.all_history.groupby("restart")["objective"].max()
    assert best.round(6).nunique() == 2
    assert best[fit.restart] == pytest.approx(best.max(), rel=1e-12)
    assert fit.elbo >= best.max() and fit.elbo == pytest.approx(
        fit.log_evidence, rel=1e-9
    )  # q ends with an E-step
