"""EM through `lvmppl.fit` on ordinary model functions, beside scikit-learn, pomegranate, hmmlearn and dynamax.

    python benchmarks/em.py [mixture] [hmm] [restarts] [memmap] [--repetitions 7] [--threads T]

- `mixture`   Gaussian mixtures of 100 000 × 16 data, 16 components, diagonal and full covariance, ms an iteration
- `hmm`       a categorical hidden Markov model, 100 sequences of 500 steps, 32 states, 256 symbols, ms an iteration
- `restarts`  20 restarts of a full-covariance mixture with 3 components on Fisher's irises, seconds in all
- `memmap`    a diagonal mixture of 10 000 000 × 4 data in a .npy memory map, seconds and the peak of resident memory

Everything starts from the same parameters. Milliseconds an iteration are (seconds of b iterations − seconds of a)
/ (b − a), so that what a fit does once counts for nobody. The programs take turns, each in a process of its own (see
`apart.py`); what is printed is the median of their repetitions and the median of the ratios of paired runs, beside the
ratio aimed at. Ours and scikit-learn and hmmlearn
work in float64; pomegranate knows float32 only; dynamax is shown in both, its `fit_em` compiled as a whole and warmed
up. (A model works in the dtype of its floating data, else in torch's default: symbols are integers, so that the hidden
Markov model is in float64 because its parameters are made so.) Peers that are not installed are skipped (`pip install
scikit-learn pomegranate hmmlearn dynamax`).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from apart import Apart
from torch import Tensor
from torch.distributions import constraints

import lvmppl
from lvmppl.distributions import MarkovChain

Fit = Callable[[int], Any]
"""A fit of so many iterations."""

ENUMERATE = {"enumerate": "parallel"}


# ---------------------------------------------------------------------------------------------------------- timing


def per_iteration(fits: Mapping[str, Apart], repetitions: int, few: int, many: int) -> dict[str, list[float]]:
    """Milliseconds an iteration, a list of repetitions by program; the programs take turns."""
    for fit in fits.values():
        fit.seconds(few), fit.seconds(many)
    result: dict[str, list[float]] = {name: [] for name in fits}
    for _ in range(repetitions):
        for name, fit in fits.items():
            once = fit.seconds(few)
            result[name].append(1e3 * (fit.seconds(many) - once) / (many - few))
    return result


def show(title: str, found: Mapping[str, list[float]], unit: str, aims: Mapping[str, float]) -> None:
    """Medians of every program, and ours in relation to each peer."""
    print(title)
    for name, runs in found.items():
        line = f"  {name:32s} {statistics.median(runs):9.2f} {unit}"
        mine = "lvmppl float32" if "float32" in name and "lvmppl float32" in found else "lvmppl"
        if not name.startswith("lvmppl"):
            ratios = [a / b for a, b in zip(found[mine], runs, strict=True)]
            line += f"   {mine} / this: {statistics.median(ratios):.3f}"
            line += f"  (aim: at most {aims[name]})" if name in aims else ""
        print(line, flush=True)


def is_installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


# --------------------------------------------------------------------------------------------------------- mixtures


def diagonal_mixture(x: Tensor, loc: Tensor, variance: float) -> None:
    size, width = loc.shape
    weights = pyro.param("weights", torch.ones(size) / size, constraint=constraints.simplex)
    loc = pyro.param("loc", loc)
    spread = pyro.param("variance", torch.full((size, width), variance), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.Normal(loc[z], spread[z].sqrt()).to_event(1), obs=x)


def full_mixture(x: Tensor, loc: Tensor, variance: float) -> None:
    size, width = loc.shape
    weights = pyro.param("weights", torch.ones(size) / size, constraint=constraints.simplex)
    loc = pyro.param("loc", loc)
    start = variance * torch.eye(width).repeat(size, 1, 1)
    covariance = pyro.param("covariance", start, constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer=ENUMERATE)
        pyro.sample("x", dist.MultivariateNormal(loc[z], covariance[z]), obs=x)


def scikit_mixture(x: np.ndarray, loc: np.ndarray, variance: float, kind: str) -> Fit:
    from sklearn.mixture import GaussianMixture

    size, width = loc.shape
    precision = np.eye(width) / variance if kind == "full" else np.ones(width) / variance

    def fit(iterations: int) -> Any:
        model = GaussianMixture(
            size, covariance_type=kind, tol=0.0, reg_covar=0.0, max_iter=iterations, means_init=loc,
            weights_init=np.ones(size) / size, precisions_init=np.repeat(precision[None], size, 0),
        )  # fmt: skip
        return model.fit(x)

    return fit


def pomegranate_mixture(x: np.ndarray, loc: np.ndarray, variance: float, kind: str) -> Fit:
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    data, centres = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(loc, dtype=torch.float32)
    spread = variance * (torch.eye(loc.shape[1]) if kind == "full" else torch.ones(loc.shape[1]))

    def fit(iterations: int) -> Any:
        parts = [Normal(c.clone(), spread.clone(), covariance_type=kind) for c in centres]
        return GeneralMixtureModel(parts, tol=-np.inf, max_iter=iterations).fit(data)

    return fit


def mixture(repetitions: int) -> None:
    rng = np.random.default_rng(0)
    rows, width, size, variance = 100_000, 16, 16, 9.0
    centres = 3 * rng.normal(size=(size, width))
    x = centres[rng.integers(0, size, rows)] + rng.normal(size=(rows, width))
    loc = x[:size].copy()
    models = {"diag": diagonal_mixture, "full": full_mixture}
    aims = {
        "diag": {"scikit-learn": 0.35},
        "full": {"scikit-learn": 0.3, "pomegranate float32": 0.9},
    }
    for kind, model in models.items():
        own = functools.partial(model, loc=torch.as_tensor(loc), variance=variance)
        fits = {"lvmppl": Apart(functools.partial(ours, own, x), objectives)}
        if is_installed("sklearn"):
            build = functools.partial(scikit_mixture, x, loc, variance, kind)
            fits["scikit-learn"] = Apart(build, lambda fit: fit.lower_bound_)
        if is_installed("pomegranate"):
            fits["pomegranate float32"] = Apart(
                functools.partial(pomegranate_mixture, x, loc, variance, kind)
            )
        check_mixtures(fits, rows)
        show(
            f"{kind} mixture, N={rows} D={width} K={size}",
            per_iteration(fits, repetitions, 2, 12),
            "ms an iteration",
            aims[kind],
        )


def check_mixtures(fits: Mapping[str, Apart], rows: int) -> None:
    """The log evidence after four iterations is everybody's, so that everybody did the same work."""
    found = fits["lvmppl"].result(4)[-2]
    if "scikit-learn" in fits:
        np.testing.assert_allclose(fits["scikit-learn"].result(4) * rows, found, rtol=1e-9)


def ours(model: Callable[..., Any], x: np.ndarray) -> Fit:
    data = {"x": torch.as_tensor(x)}
    return lambda iterations: lvmppl.fit(model, data, algorithm="em", max_steps=iterations, tolerance=0)


def objectives(fit: Any) -> list[float]:
    """Log evidence after each step of one of our fits."""
    return [float(v) for v in fit.history["objective"]]


# ------------------------------------------------------------------------------------------- hidden Markov models


def hidden_markov(x: Tensor, initial: Tensor, transition: Tensor, emission: Tensor) -> None:
    initial = pyro.param("initial", initial, constraint=constraints.simplex)
    transition = pyro.param("transition", transition, constraint=constraints.simplex)
    emission = pyro.param("emission", emission, constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", MarkovChain(initial, transition, x.shape[1]), infer=ENUMERATE)
        pyro.sample("x", dist.Categorical(emission[z]).to_event(1), obs=x)


def hmmlearn_fit(x: np.ndarray, start: Mapping[str, np.ndarray]) -> Fit:
    from hmmlearn.hmm import CategoricalHMM

    states, symbols = start["emission"].shape
    column, lengths = x.reshape(-1, 1), [x.shape[1]] * len(x)

    def fit(iterations: int) -> Any:
        model = CategoricalHMM(
            states,
            n_features=symbols,
            n_iter=iterations,
            tol=-np.inf,
            init_params="",
            implementation="scaling",
        )
        model.startprob_, model.transmat_ = start["initial"].copy(), start["transition"].copy()
        model.emissionprob_ = start["emission"].copy()
        return model.fit(column, lengths)

    return fit


def dynamax_fit(x: np.ndarray, start: Mapping[str, np.ndarray], dtype: str) -> Fit:
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import CategoricalHMM

    states, symbols = start["emission"].shape
    wide = functools.partial(jax.enable_x64, dtype == "float64")
    with wide():
        # Concentrations of 1 are no priors: maximum likelihood, as the others.
        model = CategoricalHMM(
            states, 1, symbols, initial_probs_concentration=1.0, transition_matrix_concentration=1.0,
            emission_prior_concentration=1.0,
        )  # fmt: skip
        parameters, properties = model.initialize(
            jax.random.PRNGKey(0),
            initial_probs=jnp.asarray(start["initial"], dtype),
            transition_matrix=jnp.asarray(start["transition"], dtype),
            emission_probs=jnp.asarray(start["emission"], dtype)[:, None],
        )
        emissions = jnp.asarray(x)[..., None]

    @functools.cache
    def compiled(iterations: int) -> Any:
        return jax.jit(lambda p, e: model.fit_em(p, properties, e, num_iters=iterations, verbose=False))

    def fit(iterations: int) -> Any:
        with wide():
            return jax.block_until_ready(compiled(iterations)(parameters, emissions))

    return fit


def hmm(repetitions: int) -> None:
    rng = np.random.default_rng(0)
    sequences, steps, states, symbols = 100, 500, 32, 256
    x = rng.integers(0, symbols, (sequences, steps))
    start = {
        "initial": rng.dirichlet(np.ones(states)),
        "transition": rng.dirichlet(np.ones(states), states),
        "emission": rng.dirichlet(np.ones(symbols), states),
    }

    def model(dtype: torch.dtype) -> Callable[..., Any]:
        own = {k: torch.as_tensor(v, dtype=dtype) for k, v in start.items()}
        return functools.partial(hidden_markov, **own)

    fits = {
        "lvmppl": Apart(lambda: ours(model(torch.float64), x), objectives),
        "lvmppl float32": Apart(lambda: ours(model(torch.float32), x), objectives),
    }
    aims = {"hmmlearn scaling": 0.25, "dynamax float64": 0.5, "dynamax float32": 0.5}
    if is_installed("hmmlearn"):
        fits["hmmlearn scaling"] = Apart(
            lambda: hmmlearn_fit(x, start), lambda fit: list(fit.monitor_.history)
        )
    if is_installed("dynamax"):
        for dtype in ("float64", "float32"):
            build = functools.partial(dynamax_fit, x, start, dtype)
            fits[f"dynamax {dtype}"] = Apart(build, lambda found: np.asarray(found[1]))
    check_chains(fits)
    title = f"categorical hidden Markov model, N={sequences} T={steps} K={states} V={symbols}"
    show(title, per_iteration(fits, repetitions, 2, 12), "ms an iteration", aims)


def check_chains(fits: Mapping[str, Apart]) -> None:
    """Log evidences of three iterations agree (hmmlearn and dynamax report those before the last update)."""
    found = np.array(fits["lvmppl"].result(3))
    if "hmmlearn scaling" in fits:
        np.testing.assert_allclose(fits["hmmlearn scaling"].result(3), found[:3], rtol=1e-9)
    if "dynamax float64" in fits:
        values = fits["dynamax float64"].result(3)  # with the constant of its flat priors
        np.testing.assert_allclose(np.diff(values), np.diff(found[:3]), rtol=1e-6)


# --------------------------------------------------------------------------------------------------------- restarts


def restarts(repetitions: int) -> None:
    from sklearn.datasets import load_iris

    x, tolerance, count = load_iris().data, 1e-8, 20
    model = functools.partial(full_mixture, loc=torch.as_tensor(x[[10, 60, 110]]), variance=1.0)
    data = {"x": torch.as_tensor(x)}

    def own() -> Any:
        return lvmppl.fit(
            model, data, algorithm="em", init="kmeans", restarts=count, tolerance=tolerance, max_steps=1000
        )

    def peer(init: str) -> Callable[[], Any]:
        from sklearn.mixture import GaussianMixture

        return lambda: GaussianMixture(
            3, n_init=count, tol=absolute, reg_covar=0.0, max_iter=1000, init_params=init, random_state=0
        ).fit(x)

    programs, aims = {"lvmppl": Apart(lambda: own)}, {}
    # Our restarts but the first start at random responsibilities, as scikit-learn's `random` does: of these two programs
    # each takes about 2000 steps in all. Its default `kmeans` starts 20 times next to the same optimum, about 540 steps.
    # A change of the total by 1e-8 of itself is one of the mean log-likelihood, scikit-learn's measure, by this:
    absolute = tolerance * 180.2 / len(x)
    for init in ("kmeans", "random"):
        programs[f"scikit-learn {init}"] = Apart(functools.partial(peer, init))
        aims[f"scikit-learn {init}"] = 0.3
    for run in programs.values():
        run.seconds()
    found: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, run in programs.items():
            found[name].append(run.seconds())
    show(f"{count} restarts of a mixture of irises, K=3, full covariance, to {tolerance:g}", found, "s", aims)


# ------------------------------------------------------------------------------------------------------- memory map


def write_rows(path: Path, rows: int, width: int) -> None:
    table = np.lib.format.open_memmap(path, mode="w+", dtype="float64", shape=(rows, width))
    rng, step = np.random.default_rng(0), 500_000
    for begin in range(0, rows, step):
        size = min(step, rows - begin)
        table[begin : begin + size] = rng.normal(size=(size, width)) + 3.0 * rng.integers(0, 3, (size, 1))
    table.flush()


def mapped_fit(path: str, pipe: Any) -> None:
    """In a process of its own, whose peak of resident memory is this fit's."""
    warnings.simplefilter("ignore")
    x = np.load(path, mmap_mode="r")
    loc = torch.tensor([0.0, 3.0, 7.0], dtype=torch.float64).unsqueeze(1).expand(3, x.shape[1]).clone()
    model = functools.partial(diagonal_mixture, loc=loc, variance=1.0)
    begin = time.perf_counter()
    fit = lvmppl.fit(model, {"x": x}, algorithm="em", max_steps=3, tolerance=0)
    pipe.send(
        (time.perf_counter() - begin, fit.history["seconds"].tolist(), fit.log_evidence, memory_peaks())
    )


def memory_peaks() -> dict[str, float]:
    """Kilobytes of resident memory at its peak, and of that what is not pages of files now (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {k: float(fields[k].split()[0]) / 2**20 for k in ("VmHWM", "RssAnon")}


def memmap(repetitions: int) -> None:
    rows, width = 10_000_000, 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        write_rows(path, rows, width)
        here, there = multiprocessing.get_context("spawn").Pipe(False)
        process = multiprocessing.get_context("spawn").Process(target=mapped_fit, args=(str(path), there))
        process.start()
        seconds, marks, log_evidence, peaks = here.recv()
        process.join()
    print(f"diagonal mixture of a memory map, N={rows} D={width} K=3 ({rows * width * 8 / 2**30:.2f} GiB)")
    print(
        f"  3 iterations {seconds:.1f} s, {statistics.median(np.diff(marks)):.2f} s each; log p(x) {log_evidence:.1f}"
    )
    print(
        f"  peak of resident memory {peaks['VmHWM']:.2f} GiB (aim: below 2), of which anonymous {peaks['RssAnon']:.2f}"
    )


SECTIONS = {"mixture": mixture, "hmm": hmm, "restarts": restarts, "memmap": memmap}


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of EM beside its peers.")
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # peers warn that they did not converge, as they were told
    print(f"threads={args.threads}")
    for name in args.sections or SECTIONS:
        SECTIONS[name](args.repetitions)


if __name__ == "__main__":
    main()
