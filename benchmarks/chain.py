"""Posterior marginals and expected transition counts of a categorical hidden Markov model, beside hmmlearn and dynamax.

    python benchmarks/chain.py [--sequences 100] [--steps 500] [--states 32] [--symbols 256] [--repetitions 15]

One pass = from observed symbols to log p(x), p(z_t | x) and Σ_t p(z_t, z_{t+1} | x). The programs take turns in one
process, each in the precision named; printed are medians and ratios of medians. Peers that are not installed are skipped
(`pip install hmmlearn dynamax`). Every program's counts are compared with ours first.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from lvmppl.exact import chain

Pass = Callable[[], np.ndarray]


def problem(args: argparse.Namespace) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "initial": rng.dirichlet(np.ones(args.states)),
        "transition": rng.dirichlet(np.ones(args.states), args.states),
        "emission": rng.dirichlet(np.ones(args.symbols), args.states),
        "x": rng.integers(args.symbols, size=(args.sequences, args.steps)),
    }


def ours(p: dict[str, np.ndarray], dtype: torch.dtype) -> Pass:
    initial, transition, emission = (
        torch.as_tensor(p[k], dtype=dtype) for k in ("initial", "transition", "emission")
    )
    x = torch.as_tensor(p["x"])

    def run() -> np.ndarray:
        log_likelihood = emission.log().T.contiguous()[x]
        posterior = chain.marginals(initial.log()[None], transition.log()[None, None], log_likelihood)
        return posterior.transition[0, 0].numpy()

    return run


def hmmlearn_pass(p: dict[str, np.ndarray]) -> Pass:
    from hmmlearn.hmm import CategoricalHMM

    states, symbols = p["emission"].shape
    model = CategoricalHMM(states, n_features=symbols, implementation="scaling", params="st")
    model.startprob_, model.transmat_, model.emissionprob_ = p["initial"], p["transition"], p["emission"]
    column, lengths = p["x"].reshape(-1, 1), [p["x"].shape[1]] * len(p["x"])

    def run() -> np.ndarray:
        statistics_, _ = model._do_estep(column, lengths)
        counts: np.ndarray = statistics_["trans"]
        return counts

    return run


def dynamax_pass(p: dict[str, np.ndarray], dtype: str) -> Pass:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from dynamax.hidden_markov_model.inference import hmm_smoother

    arrays = [jnp.asarray(p[k], dtype=dtype) for k in ("initial", "transition", "emission")]
    x = jnp.asarray(p["x"])

    @jax.jit
    def smooth(initial, transition, emission, x):  # type: ignore[no-untyped-def]
        log_likelihood = jnp.log(emission).T[x]
        posterior = jax.vmap(lambda row: hmm_smoother(initial, transition, row))(log_likelihood)
        return posterior.marginal_loglik, posterior.smoothed_probs, posterior.trans_probs.sum(0)

    def run() -> np.ndarray:
        results = jax.block_until_ready(smooth(*arrays, x))
        return np.asarray(results[2])

    return run


def programs(p: dict[str, np.ndarray]) -> dict[str, Pass]:
    found = {"ours float64": ours(p, torch.float64), "ours float32": ours(p, torch.float32)}
    if importlib.util.find_spec("hmmlearn"):
        found["hmmlearn float64"] = hmmlearn_pass(p)
    if importlib.util.find_spec("dynamax"):
        found["dynamax float64"] = dynamax_pass(p, "float64")
        found["dynamax float32"] = dynamax_pass(p, "float32")
    return found


def alternate(passes: dict[str, Pass], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each pass, the programs taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repetitions):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(args: argparse.Namespace) -> None:
    passes = programs(problem(args))
    expected = passes["ours float64"]()
    for name, run in passes.items():
        np.testing.assert_allclose(run(), expected, rtol=1e-3 if "32" in name else 1e-9, err_msg=name)
    seconds = alternate(passes, args.repetitions)
    print(
        f"B={args.sequences} T={args.steps} K={args.states} V={args.symbols}, threads={torch.get_num_threads()}"
    )
    for name, runs in seconds.items():
        mine = f"ours {name.split()[1]}"
        ratio = statistics.median(seconds[mine]) / statistics.median(runs)
        print(
            f"{name:18s} median {1e3 * statistics.median(runs):8.1f} ms   least {1e3 * min(runs):8.1f} ms"
            f"   ours/this {ratio:.3f}"
        )


def scaling(args: argparse.Namespace) -> None:
    """Seconds a step as T grows: constant when the cost is linear."""
    print("cost in T (B=10):")
    for steps in (250, 1_000, 4_000, 16_000, 64_000):
        part = argparse.Namespace(sequences=10, steps=steps, states=args.states, symbols=args.symbols)
        run = ours(problem(part), torch.float64)
        run()
        seconds = statistics.median(alternate({"ours": run}, 3)["ours"])
        print(f"  T={steps:6d}  {1e3 * seconds:9.1f} ms   {1e6 * seconds / steps:6.2f} µs a step")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of chain inference beside its peers.")
    for name, default in (
        ("sequences", 100),
        ("steps", 500),
        ("states", 32),
        ("symbols", 256),
        ("repetitions", 15),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compare(args)
    scaling(args)


if __name__ == "__main__":
    main()
