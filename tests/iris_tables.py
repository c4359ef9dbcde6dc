"""The tables of a plausible run on iris: scikit-learn's mixture as the exact fits, noisy copies of its
responsibilities as the variational ones, each fit with its own numbering of the components.
"""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pandas as pd
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from lvmppl import tables

COLUMNS = ["x.sepal_length", "x.sepal_width", "x.petal_length", "x.petal_width"]
ORDERS = {"em": [0, 1, 2], "enumeration": [2, 0, 1], "local": [1, 0, 2], "amortized": [1, 2, 0]}
ALGORITHMS = {"em": "em", "enumeration": "enumeration", "local": "vem", "amortized": "svi"}
GUIDES = {"local": "categorical", "amortized": "categorical_encoder"}


def iris_data() -> pd.DataFrame:
    return pd.DataFrame(load_iris().data, columns=COLUMNS)


def em_history(x: np.ndarray, seed: int, steps: int) -> tuple[GaussianMixture, list[float]]:
    """Log evidence before and after each EM step of scikit-learn."""
    mixture = GaussianMixture(
        3, init_params="random_from_data", reg_covar=1e-6, max_iter=1, warm_start=True, random_state=seed
    )
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in range(steps):
            mixture.fit(x)
            values.append(mixture.score(x) * len(x))
    return mixture, [values[0] - 260.0, *values]


def kl(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL[q ‖ p] per row, 0 log 0 = 0."""
    positive = q > 0
    ratio = np.where(positive, q, 1.0) / np.where(positive, p, 1.0)
    return np.maximum((np.where(positive, q, 0.0) * np.log(ratio)).sum(1), 0.0)


def posterior_rows(fit: str, kind: str, probs: np.ndarray, site: str = "z") -> pd.DataFrame:
    """[N, K] responsibilities as rows of the posterior table."""
    num_data, num_states = probs.shape
    return pd.DataFrame(
        {
            "fit": fit,
            "kind": kind,
            "site": site,
            "datum": np.repeat(np.arange(num_data), num_states),
            "position": "",
            "state": np.tile(np.arange(num_states), num_data),
            "probability": probs.ravel(),
            "mean": np.nan,
            "sd": np.nan,
        }
    )


def history_rows(fit: str, restart: int, values: list[float] | np.ndarray, kind: str) -> pd.DataFrame:
    steps = np.arange(len(values))
    return pd.DataFrame(
        {
            "fit": fit,
            "restart": restart,
            "step": steps,
            "seconds": 0.002 * steps,
            "objective": values,
            "objective_kind": kind,
        }
    )


def variational(fit: str, exact: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A local family that is nearly right, an amortized one that errs on a few data."""
    noise = {"local": 1e-4, "amortized": 0.15}[fit]
    with np.errstate(divide="ignore"):
        logits = np.maximum(np.log(exact), -30.0)
    logits = 0.98 * logits + noise * rng.normal(size=exact.shape) * np.abs(logits)
    q = np.exp(logits - logits.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    if fit == "local":  # closed-form E-steps leave most rows exactly right
        q[rng.random(len(q)) < 0.4] = np.nan
        q = np.where(np.isnan(q), exact, q)
    return q


def summary_row(fit: str, log_evidence: float, elbo: float, steps: int) -> dict[str, object]:
    return {
        "fit": fit,
        "algorithm": ALGORITHMS[fit],
        "guide": GUIDES.get(fit, ""),
        "status": "max_steps" if fit == "amortized" else "converged",
        "steps": steps,
        "seconds": 0.002 * steps,
        "log_evidence": log_evidence,
        "log_evidence_kind": "exact",
        "log_evidence_error": np.nan,
        "elbo": elbo,
        "elbo_error": np.nan,
        "gap": log_evidence - elbo,
        "test_log_evidence": np.nan,
        "test_elbo": np.nan,
        "message": {
            "em": "closed form: weights, locations, covariances",
            "amortized": "stopped after max_steps",
        }.get(fit, ""),
    }


@cache
def iris_tables() -> dict[str, pd.DataFrame]:
    x = iris_data().to_numpy()
    rng = np.random.default_rng(3)
    summary, history, posterior, gaps, parameters = [], [], [], [], []
    runs = [em_history(x, seed, 40) for seed in (0, 1, 4, 7)]
    mixture, curve = max(runs, key=lambda run: run[1][-1])
    order0 = np.argsort(mixture.means_[:, 2])
    exact0, per_datum = mixture.predict_proba(x)[:, order0], mixture.score_samples(x)
    for fit, order in ORDERS.items():
        exact = exact0[:, order]
        posterior.append(posterior_rows(fit, "exact", exact))
        evidence, elbo, values, kind = per_datum.sum(), np.nan, np.asarray(curve), "log_evidence"
        if fit in GUIDES:
            q = variational(fit, exact, rng)
            gap = kl(q, exact)
            posterior.append(posterior_rows(fit, "variational", q))
            gaps.append(
                pd.DataFrame(
                    {
                        "fit": fit,
                        "datum": np.arange(len(x)),
                        "log_evidence": per_datum,
                        "elbo": per_datum - gap,
                        "gap": gap,
                    }
                )
            )
            elbo, kind = float((per_datum - gap).sum()), "elbo"
            t = np.arange(3001 if fit == "amortized" else 121)
            values = elbo - 900.0 * np.exp(-t / (len(t) / 15)) - (0.0 if fit == "local" else 1.0)
            values = values + (
                rng.normal(size=len(t)) * (6.0 + 40.0 * np.exp(-t / 300)) if fit == "amortized" else 0.0
            )
        history.append(history_rows(fit, 0, values, kind))
        if fit == "em":
            history += [history_rows(fit, r, c, kind) for r, (m, c) in enumerate(runs, 1) if m is not mixture]
        summary.append(summary_row(fit, evidence, elbo, len(values) - 1))
        locations = mixture.means_[order0][order]
        parameters += [
            {"fit": fit, "parameter": "locations", "position": f"{k},{d}", "value": locations[k, d]}
            for k in range(3)
            for d in range(4)
        ]
    frames = {
        "summary": pd.DataFrame(summary),
        "history": pd.concat(history),
        "parameters": pd.DataFrame(parameters),
        "posterior": pd.concat(posterior),
        "gaps": pd.concat(gaps),
    }
    return {name: tables.validate(name, frame) for name, frame in frames.items()}
