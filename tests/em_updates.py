"""Textbook updates of EM in numpy, for tables that repeat entries and for ways to spell a parameter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special, stats

Values = dict[str, np.ndarray]
Update = Callable[[Values, Values], Values]


def posterior(log_joint: np.ndarray) -> np.ndarray:
    """p(z | x) over the first axis."""
    result: np.ndarray = special.softmax(log_joint, 0)
    return result


def of_two_latents(p: Values, density: np.ndarray) -> tuple[np.ndarray, Values]:
    """q [2, 2, N], and the update of the two priors. density: log p(x | a, b) [2, 2, N]."""
    log_joint = (np.log(p["first"])[:, None] + np.log(p["second"]))[..., None] + density
    q = posterior(log_joint.reshape(4, -1)).reshape(2, 2, -1)
    n = q.sum(-1)
    return q, {"first": n.sum(1) / n.sum(), "second": n / n.sum(1, keepdims=True)}


def symmetric_rates(p: Values, d: Values) -> Values:
    where = np.array([[0, 1], [1, 2]])
    q, priors = of_two_latents(p, stats.poisson.logpmf(d["x"], p["rate"][where][..., None]))
    rate = [q[where == i].dot(d["x"]).sum() / q[where == i].sum() for i in range(3)]
    return {**priors, "rate": np.array(rate)}


def triangular_locations(p: Values, d: Values) -> Values:
    x, (diagonal, below) = d["x"], p["loc"]
    table = np.array([[diagonal, 0.0], [below, diagonal]])
    q, priors = of_two_latents(p, stats.norm.logpdf(x, table[..., None], p["scale"]))
    diagonal = ((q[0, 0] + q[1, 1]) @ x) / (q[0, 0] + q[1, 1]).sum()
    below = q[1, 0] @ x / q[1, 0].sum()
    table = np.array([[diagonal, 0.0], [below, diagonal]])
    spread = (q * (x - table[..., None]) ** 2).sum() / len(x)
    return {**priors, "loc": np.array([diagonal, below]), "scale": np.sqrt(spread)}


def waiting_times(p: Values, d: Values) -> Values:
    x, y, w = d["x"], d["y"], d["w"]
    density = stats.geom.logpmf(x + 1, p["p"][:, None]) + stats.binom.logpmf(x, 30, 1 - p["q"][:, None])
    density = density + stats.expon.logpdf(y, scale=p["mean"][:, None])
    density = density + stats.gamma.logpdf(y, 2.5, scale=1 / p["rate"][:, None])
    q = posterior(np.log(p["weights"])[:, None] + density)
    n = q.sum(1)
    return {
        "weights": q.mean(1),
        "p": n / (n + q @ x),
        "q": 1 - q @ x / (30 * n),
        "mean": q @ y / n,
        "rate": 2.5 * n / (q @ y),
        "spread": np.abs(w - 0.5).mean(),
    }


def further_spellings(p: Values, d: Values) -> Values:
    x, y, w = d["x"], d["y"], d["w"]
    density = stats.poisson.logpmf(x, np.exp(p["log_rate"])[:, None])
    density = density + stats.binom.logpmf(x, 30, special.expit(p["logit"])[:, None])
    density = density + stats.geom.logpmf(x + 1, special.expit(p["chance"])[:, None])
    density = density + stats.expon.logpdf(y, scale=1 / np.logaddexp(0, p["soft"])[:, None])
    density = density + stats.norm.logpdf(w, 0.2, np.exp(p["log_scale"])[:, None])
    q = posterior(special.log_softmax(p["logits"])[:, None] + density)
    n = q.sum(1)
    return {
        "logits": np.log(q.mean(1)) + special.logsumexp(p["logits"]),
        "log_rate": np.log(q @ x / n),
        "logit": special.logit(q @ x / (30 * n)),
        "chance": special.logit(n / (n + q @ x)),
        "soft": np.log(np.expm1(n / (q @ y))),
        "log_scale": np.log(q @ (w - 0.2) ** 2 / n) / 2,
    }


def spelled_in_logarithms(p: Values, d: Values) -> Values:
    x = d["x"]
    density = stats.norm.logpdf(x, p["loc"][:, None], np.exp(p["log_variance"] / 2)).sum(-1)
    q = posterior(special.log_softmax(p["logits"])[:, None] + density)
    loc = q @ x / q.sum(1)[:, None]
    variance = np.einsum("kn,knd->d", q, (x - loc[:, None]) ** 2) / len(x)
    logits = np.log(q.mean(1)) + special.logsumexp(p["logits"])
    return {"logits": logits, "loc": loc, "log_variance": np.log(variance)}


def tied_precision_matrix(p: Values, d: Values) -> Values:
    x, covariance = d["x"], np.linalg.inv(p["precision"])
    density = np.stack([stats.multivariate_normal.logpdf(x, m, covariance) for m in p["loc"]])
    q = posterior(np.log(p["weights"])[:, None] + density)
    loc = q @ x / q.sum(1)[:, None]
    from_mean = x - loc[:, None]
    scatter = np.einsum("kn,kni,knj->ij", q, from_mean, from_mean)
    return {"weights": q.mean(1), "loc": loc, "precision": np.linalg.inv(scatter / len(x))}


def partly_masked(p: Values, d: Values) -> Values:
    x, seen = d["x"], d["seen"]
    density = stats.norm.logpdf(x, p["loc"][:, None], np.sqrt(p["variance"])[:, None]).sum(-1)
    q = posterior(np.log(p["weights"])[:, None] + seen * density)
    own = q * seen
    n = own.sum(1)[:, None]
    loc = own @ x / n
    squares = np.einsum("kn,knd->kd", own, (x - loc[:, None]) ** 2)
    return {"weights": q.mean(1), "loc": loc, "variance": squares / n}


def chosen_by_the_data(p: Values, d: Values) -> Values:
    x, group = d["x"], d["group"]
    q = posterior(np.log(p["weights"])[:, None] + stats.norm.logpdf(x, p["loc"][:, group], p["scale"]))
    hot = np.eye(4)[group]
    loc = (q * x) @ hot / (q @ hot)
    spread = (q * (x - loc[:, group]) ** 2).sum() / len(x)
    return {"weights": q.mean(1), "loc": loc, "scale": np.sqrt(spread)}


UPDATES: list[Update] = [
    symmetric_rates,
    triangular_locations,
    waiting_times,
    further_spellings,
    spelled_in_logarithms,
    tied_precision_matrix,
    partly_masked,
    chosen_by_the_data,
]
