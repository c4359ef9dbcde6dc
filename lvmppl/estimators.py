"""The table of gradient estimators: for which sites of a guide each is valid, and why it is not for the others.

    ∇_λ E_{q(z; λ)}[f(z)],   f(z) = log p(x, z) − log q(z; λ)

`enumeration` sums over the states of q; `pathwise` differentiates through the draw z(λ, ε) (Kingma & Welling 2014);
`score_function` weighs ∇ log q by the draw's own terms of f less a baseline (Williams 1992); `gumbel_softmax` (Jang et al.
2017; Maddison et al. 2017) and `straight_through` (Bengio et al. 2013) put a relaxed state into the model, at a bias.
"""

from __future__ import annotations

from typing import NamedTuple

from lvmppl.errors import InputError


class EstimatorKind(NamedTuple):
    """A row of the table: the kinds of sites that it serves, whether it is unbiased, and what it does."""

    serves: tuple[str, ...]
    unbiased: bool
    text: str


ESTIMATORS: dict[str, EstimatorKind] = {
    "enumeration": EstimatorKind(
        ("binary", "one_hot", "finite", "chain"), True, "an exact sum over the states under q"
    ),
    "pathwise": EstimatorKind(("reparameterised", "point"), True, "differentiates through the draw"),
    "score_function": EstimatorKind(
        ("binary", "one_hot", "finite", "chain", "reparameterised", "drawn", "vector"),
        True,
        "∇ log q times the draw's own terms of the bound, less a baseline",
    ),
    "gumbel_softmax": EstimatorKind(
        ("binary", "one_hot", "vector"),
        False,
        "a relaxed state in the model; its bias vanishes with the temperature",
    ),
    "straight_through": EstimatorKind(
        ("binary", "one_hot", "vector"), False, "a state in the model, the gradient of the relaxed one"
    ),
}

KINDS: dict[str, str] = {
    "binary": "a binary site (0 or 1)",
    "one_hot": "a one-hot site",
    "finite": "a site whose states are integers",
    "chain": "the state sequence of a MarkovChain",
    "reparameterised": "a continuous site with a reparameterised draw",
    "point": "a site at one point",
    "vector": "a vector of binary or one-hot states",
    "drawn": "a site without a finite sum or a reparameterised draw",
}
"""Kinds of sites in a guide, by how they can be drawn."""

_REASONS: dict[tuple[str, str], str] = {
    ("enumeration", "reparameterised"): "its values cannot be enumerated",
    ("enumeration", "drawn"): "its values cannot be enumerated",
    (
        "enumeration",
        "vector",
    ): "its states are a product of all its entries' (declare the entries with pyro.plate)",
    ("enumeration", "point"): "it has one value, and nothing to sum",
    ("pathwise", "drawn"): "its draw has no derivative in λ",
    ("score_function", "point"): "a point has no density to take the score of",
    (
        "gumbel_softmax",
        "finite",
    ): "a relaxed state is a vector and cannot be the integer that the model indexes with",
    (
        "straight_through",
        "finite",
    ): "a relaxed state is a vector and cannot be the integer that the model indexes with",
}
_DISCRETE = ("binary", "one_hot", "finite", "chain", "vector")


def default_estimator(kind: str) -> str:
    """What `auto` takes: the sum where it is finite, the derivative of the draw where it has one, else the score."""
    return next(name for name, row in ESTIMATORS.items() if kind in row.serves)


def valid_estimators(kind: str) -> tuple[str, ...]:
    """The estimators that serve a kind of site, the default one first."""
    return tuple(name for name, row in ESTIMATORS.items() if kind in row.serves)


def why_not(name: str, kind: str) -> str:
    """Why an estimator does not serve a kind of site; empty where it does."""
    if kind in ESTIMATORS[name].serves:
        return ""
    relaxed = name in ("gumbel_softmax", "straight_through")
    if name == "pathwise" and kind in _DISCRETE:
        return "the draw of a discrete state has no derivative in λ"
    if relaxed and kind == "chain":
        return "a chain has no relaxed sequence"
    if relaxed and kind not in _DISCRETE:
        return "only discrete states are relaxed"
    return _REASONS[name, kind]


def check_estimator(name: str, kind: str, where: str) -> None:
    """Raises InputError, which says why, when an estimator does not serve a kind of site."""
    why = why_not(name, kind)
    if not why:
        return
    fix = f"use {', '.join(valid_estimators(kind))}"
    if name in ("gumbel_softmax", "straight_through") and kind == "finite":
        fix += ", or draw a OneHotCategorical in the model"
    raise InputError(where, f"an estimator for {KINDS[kind]}", f"{name}: {why}", fix)


def estimators_table() -> str:
    """What goes with what, in Markdown: a row a kind of site, `yes` or why not under each estimator."""
    lines = [
        f"| site | {' | '.join(f'`{name}`' for name in ESTIMATORS)} |",
        "|---" * (1 + len(ESTIMATORS)) + "|",
    ]
    for kind, text in KINDS.items():
        lines.append(f"| {text} | {' | '.join(why_not(name, kind) or 'yes' for name in ESTIMATORS)} |")
    return "\n".join(lines) + "\n"
