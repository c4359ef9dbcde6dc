"""Exact posteriors through `lvmppl.posterior` on ordinary model functions, beside scikit-learn, hmmlearn, dynamax and pymc.

    python benchmarks/exact.py [mixture] [hmm] [scaling] [memory] [small] [--repetitions 7] [--threads T]

- `mixture`   responsibilities of a full-covariance mixture, 100 000 × 16 data, 16 components: scikit-learn's predict_proba
- `hmm`       state marginals and expected transition counts of a categorical hidden Markov model, 100 sequences × 500
              steps, 32 states, 256 symbols, from parameters and symbols: hmmlearn's scaling pass, dynamax's smoother
- `scaling`   the same two, as N and T grow: the cost of a row and of a step is constant
- `memory`    log evidence, responsibilities and entropy of the mixture at 1 000 000 rows: the peak of resident memory
- `small`     log evidence and marginals of a two-component mixture of five rows, from nothing: pymc-extras' `marginalize`
              and `recover_marginals`, which compile first (`pip install pymc-extras`)

The programs take turns, each in a process of its own (see `apart.py`); printed are the median of their repetitions, and
the median of the ratios of paired runs beside the ratio aimed at. Results are compared first. Peers that are not
installed are skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from apart import Apart

import lvmppl
from lvmppl.models.hmm import hidden_markov
from lvmppl.models.mixture import gaussian_mixture

Program = Callable[[], Any]


def seconds_of(run: Program) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def side_by_side(
    title: str, programs: Mapping[str, Apart], repetitions: int, aims: Mapping[str, float]
) -> None:
    """Every program in turn; the first is ours."""
    mine = next(iter(programs))
    for run in programs.values():
        run.seconds()
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, run in programs.items():
            seconds[name].append(run.seconds())
    print(title)
    for name, runs in seconds.items():
        line = f"  {name:24s} {1e3 * statistics.median(runs):9.1f} ms"
        if name != mine:
            ratio = statistics.median(a / b for a, b in zip(seconds[mine], runs, strict=True))
            line += f"   ours / this: {ratio:.3f}" + (
                f"  (aim: at most {aims[name]})" if name in aims else ""
            )
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------------- mixture


def mixture_problem(
    rows: int, dims: int = 16, components: int = 16
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows of a mixture, and its parameters."""
    rng = np.random.default_rng(0)
    loc = rng.normal(0, 3, (components, dims))
    root = 0.3 * rng.normal(size=(components, dims, dims)) + np.eye(dims)
    labels = rng.integers(components, size=rows)
    x = np.empty((rows, dims))
    for k in range(components):
        own = labels == k
        x[own] = loc[k] + rng.normal(size=(own.sum(), dims)) @ root[k].T
    weights = np.full(components, 1 / components)
    return x, {"weights": weights, "loc": loc, "covariance": root @ root.transpose(0, 2, 1)}


def mixture_posterior(x: np.ndarray, theta: Mapping[str, np.ndarray]) -> Any:
    model = functools.partial(gaussian_mixture, num_components=len(theta["loc"]))
    parameters = {name: torch.as_tensor(value) for name, value in theta.items()}
    return lvmppl.posterior(model, {"x": torch.as_tensor(x)}, parameters=parameters)


def mixture(args: argparse.Namespace) -> None:
    x, theta = mixture_problem(100_000)

    def own() -> Any:
        return mixture_posterior(x, theta).marginal("z").probs.numpy()

    def peer() -> Program:
        from sklearn.mixture import GaussianMixture

        found = GaussianMixture(len(theta["loc"]))
        found.weights_, found.means_, found.covariances_ = theta["weights"], theta["loc"], theta["covariance"]
        found.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(theta["covariance"])).transpose(0, 2, 1)
        return lambda: found.predict_proba(x)

    programs = {"lvmppl": Apart(lambda: own, np.array)}
    if importlib.util.find_spec("sklearn"):
        programs["scikit-learn"] = Apart(peer, np.array)
        ours, theirs = (p.result() for p in programs.values())
        np.testing.assert_allclose(ours, theirs, atol=1e-10)
    title = "responsibilities of a full mixture, N = 100 000, D = K = 16"
    side_by_side(title, programs, args.repetitions, {"scikit-learn": 0.6})


# ------------------------------------------------------------------------------------------------------------- hmm


def hmm_problem(sequences: int, steps: int, states: int = 32, symbols: int = 256) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "initial": rng.dirichlet(np.ones(states)),
        "transition": rng.dirichlet(np.ones(states), states),
        "emission": rng.dirichlet(np.ones(symbols), states),
        "x": rng.integers(symbols, size=(sequences, steps)),
    }


def hmm_pass(p: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(p(z_t | x) [B, T, K], Σ_t p(z_t, z_{t+1} | x) [K, K]) in float64."""
    model = functools.partial(hidden_markov, num_states=len(p["initial"]), num_symbols=p["emission"].shape[1])
    parameters = {n: torch.as_tensor(p[n]) for n in ("initial", "transition", "emission")}
    post = lvmppl.posterior(model, {"x": torch.as_tensor(p["x"])}, parameters=parameters)
    return post.marginal("z").probs.numpy(), post.expected_transitions("z").numpy()


def hmmlearn_pass(p: Mapping[str, np.ndarray]) -> Program:
    from hmmlearn.hmm import CategoricalHMM

    states, symbols = p["emission"].shape
    model = CategoricalHMM(states, n_features=symbols, implementation="scaling", params="st")
    model.startprob_, model.transmat_, model.emissionprob_ = p["initial"], p["transition"], p["emission"]
    column, lengths = p["x"].reshape(-1, 1), [p["x"].shape[1]] * len(p["x"])
    return lambda: (None, model._do_estep(column, lengths)[0]["trans"])


def dynamax_pass(p: Mapping[str, np.ndarray]) -> Program:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from dynamax.hidden_markov_model.inference import hmm_smoother

    arrays = [jnp.asarray(p[k]) for k in ("initial", "transition", "emission")]
    x = jnp.asarray(p["x"])

    @jax.jit
    def smooth(initial, transition, emission, x):  # type: ignore[no-untyped-def]
        log_likelihood = jnp.log(emission).T[x]
        posterior = jax.vmap(lambda row: hmm_smoother(initial, transition, row))(log_likelihood)
        return posterior.smoothed_probs, posterior.trans_probs.sum(0)

    return lambda: [np.asarray(r) for r in jax.block_until_ready(smooth(*arrays, x))]


def hmm(args: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    p = hmm_problem(100, 500)

    def counts(found: Any) -> Any:
        return found[1]

    programs = {"lvmppl": Apart(lambda: functools.partial(hmm_pass, p), counts)}
    if importlib.util.find_spec("hmmlearn"):
        programs["hmmlearn scaling"] = Apart(functools.partial(hmmlearn_pass, p), counts)
    if importlib.util.find_spec("dynamax"):
        programs["dynamax"] = Apart(functools.partial(dynamax_pass, p), counts)
    expected = programs["lvmppl"].result()
    for name, run in programs.items():
        np.testing.assert_allclose(run.result(), expected, rtol=1e-7, err_msg=name)
    title = "marginals and transition counts, 100 sequences × T = 500, K = 32, V = 256"
    side_by_side(title, programs, args.repetitions, {"hmmlearn scaling": 0.2, "dynamax": 0.4})


# --------------------------------------------------------------------------------------------- scaling and memory


def scaling(args: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    print("cost of a row of the mixture (D = K = 16)")
    for rows in (25_000, 100_000, 400_000):
        x, theta = mixture_problem(rows)
        run = functools.partial(lambda x, theta: mixture_posterior(x, theta).marginal("z"), x, theta)
        seconds = statistics.median(seconds_of(run) for _ in range(3))
        print(f"  N = {rows:8,d}  {1e3 * seconds:9.1f} ms  {1e6 * seconds / rows:7.3f} µs a row", flush=True)
    print("cost of a step of the chain (10 sequences, K = 32)")
    for steps in (1_000, 4_000, 16_000, 64_000):
        p = hmm_problem(10, steps)
        seconds = statistics.median(seconds_of(functools.partial(hmm_pass, p)) for _ in range(3))
        print(
            f"  T = {steps:8,d}  {1e3 * seconds:9.1f} ms  {1e6 * seconds / steps:7.3f} µs a step", flush=True
        )


def _measured(rows: int, queue: Any) -> None:
    import resource

    x, theta = mixture_problem(rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    post = mixture_posterior(x, theta)
    parts = [float(post.log_evidence)]
    shape = tuple(post.marginal("z").probs.shape)
    marginals = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts.append(float(post.entropy().sum()))
    queue.put((before, marginals, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, parts, shape))


def memory(args: argparse.Namespace) -> None:
    """In a process of its own, whose peak counts nothing else."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=_measured, args=(1_000_000, queue))
    worker.start()
    before, marginals, after, parts, shape = queue.get()
    worker.join()
    print("mixture, N = 1 000 000, D = K = 16: peak of resident memory (aim: under 1.5 GB)")
    print(
        f"  {before / 2**20:.2f} GiB with the data made, {marginals / 2**20:.2f} GiB after log evidence and"
    )
    print(f"  responsibilities {list(shape)}, {after / 2**20:.2f} GiB after the entropy too")
    print(f"  log evidence {parts[0]:.3f}, entropy {parts[1]:.3f}")


# ----------------------------------------------------------------------------------------------------------- small


def small(args: argparse.Namespace) -> None:
    x = np.array([-2.0, -1.5, 0.3, 1.8, 2.2])
    theta = {
        "weights": np.array([0.4, 0.6]),
        "loc": np.array([[-1.5], [1.5]]),
        "covariance": np.ones((2, 1, 1)),
    }
    begin = time.perf_counter()
    post = mixture_posterior(x[:, None], theta)
    ours = post.log_evidence, post.marginal("z").probs.numpy()
    print("a mixture of five rows, the first and only time")
    print(f"  {'lvmppl':24s} {time.perf_counter() - begin:9.2f} s")
    if importlib.util.find_spec("pymc_extras") is None:
        print("  pymc-extras is not installed")
        return
    begin = time.perf_counter()
    log_evidence, probs = _pymc(x, theta)
    print(f"  {'pymc-extras':24s} {time.perf_counter() - begin:9.2f} s")
    np.testing.assert_allclose(ours[0], log_evidence, rtol=1e-8)
    np.testing.assert_allclose(ours[1], probs, atol=1e-8)


def _pymc(x: np.ndarray, theta: Mapping[str, np.ndarray]) -> tuple[float, np.ndarray]:
    import arviz
    import pymc as pm
    import pymc_extras as pmx
    import pytensor.tensor as pt

    with pm.Model() as model:
        shift = pm.Flat("shift")  # log p needs one free variable; it stands at 0
        z = pm.Categorical("z", p=theta["weights"], shape=len(x))
        pm.Normal("x", mu=pt.as_tensor(theta["loc"][:, 0])[z] + shift, sigma=1.0, observed=x)
    marginal = pmx.marginalize(model, ["z"])
    log_evidence = float(marginal.compile_logp(vars=marginal.observed_RVs)({"shift": np.array(0.0)}))
    draws = arviz.from_dict(posterior={"shift": np.zeros((1, 1))})
    with marginal:
        found = pmx.recover_marginals(draws, var_names=["z"], return_samples=False)
    return log_evidence, np.exp(found.posterior["lp_z"].values[0, 0])


SECTIONS = {"mixture": mixture, "hmm": hmm, "scaling": scaling, "memory": memory, "small": small}


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact posteriors beside their peers.")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    for name in args.sections or SECTIONS:
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
