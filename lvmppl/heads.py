"""Heads of variational families: unconstrained or constrained outputs λ and the distribution q(z; λ) they parameterise.

A head knows nothing of where its outputs come from (`lvmppl.sources`): a table with a row per datum, or a network of
the datum. Every output starts where its unconstrained coordinates are 0: loc 0, scale 1, probabilities uniform.

Shapes: K states, T steps, D unconstrained coordinates of one site, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ReshapeTransform

from lvmppl.density import SiteInfo
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError
from lvmppl.families import safe_log
from lvmppl.outputs import Output
from lvmppl.supports import continuous_support, num_states, support_kind, support_words

Outputs = Mapping[str, Tensor]
Build = Callable[[Outputs, Mapping[str, Tensor]], Any]


@dataclass(frozen=True)
class Head:
    """q of one site: its outputs, and the distribution of their values and the data rows.

    enumerated: the states are summed, not drawn. module: weights of its own, shared by all data (a flow's).
    """

    outputs: tuple[Output, ...]
    distribution: Build
    enumerated: bool = False
    module: nn.Module | None = None


@dataclass(frozen=True)
class HeadKind:
    """A row of the table of heads: which supports it serves and how the gradient of its λ comes about.

    twice: whether torch differentiates its draw twice, as the gradient through a refined encoder's steps does.
    """

    build: Callable[..., Head] | None  # None: the site is left out of q
    supports: frozenset[str]
    gradient: str
    text: str
    settings: tuple[str, ...] = field(default=())
    twice: bool = True


# ------------------------------------------------------------------------------------------------------ discrete


def _categorical(site: SiteInfo) -> Head:
    kind = support_kind(site)

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        logits = safe_log(outputs["probs"])
        if kind == "binary":
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        return dist.OneHotCategorical(logits=logits) if kind == "one_hot" else dist.Categorical(logits=logits)

    return Head((Output("probs", (num_states(site),), constraints.simplex),), build, enumerated=True)


def _bernoulli(site: SiteInfo) -> Head:
    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return dist.Bernoulli(probs=outputs["probs"])

    return Head((Output("probs", (), constraints.unit_interval),), build, enumerated=True)


def _chain(site: SiteInfo) -> Head:
    """q(z) = π(z_1) Π_t P_t(z_t, z_{t+1}), a matrix P_t for every step."""
    states, steps = num_states(site), site.event_shape[-1]

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return MarkovChain(outputs["initial"], outputs["transition"], steps, _lengths(data))

    initial = Output("initial", (states,), constraints.simplex)
    moves = Output("transition", (max(steps - 1, 1), states, states), constraints.simplex, stepwise=True)
    return Head((initial, moves), build, enumerated=True)


def _independent_categoricals(site: SiteInfo) -> Head:
    """q(z) = Π_t Categorical(z_t | λ_t): a chain whose moves forget where they come from."""
    states, steps = num_states(site), site.event_shape[-1]

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        probs = outputs["probs"]  # [..., T, K]
        moves = probs[..., 1:, :] if steps > 1 else probs
        moves = moves.unsqueeze(-2).expand(*moves.shape[:-1], states, states)
        return MarkovChain(probs[..., 0, :], moves, steps, _lengths(data))

    return Head(
        (Output("probs", (steps, states), constraints.simplex, stepwise=True),), build, enumerated=True
    )


def _lengths(data: Mapping[str, Tensor]) -> Tensor | None:
    lengths = data.get("lengths")
    return None if lengths is None or lengths.is_floating_point() else lengths


# ---------------------------------------------------------------------------------------------------- continuous


def free_shape(site: SiteInfo) -> tuple[int, ...]:
    """The shape of the site's event in unconstrained coordinates."""
    return tuple(biject_to(continuous_support(site)).inverse_shape(torch.Size(site.event_shape)))


def _to_support(site: SiteInfo, base: Any) -> Any:
    """The distribution of t(u), u ~ base over unconstrained coordinates, t the bijection to the site's support."""
    if support_kind(site) == "real":
        return base
    return dist.TransformedDistribution(base, [biject_to(continuous_support(site))])


def _from_vector(site: SiteInfo, base: Any) -> Any:
    """A distribution over vectors [D] as one over the site's own shape and support."""
    shape = free_shape(site)
    if len(shape) != 1:
        base = dist.TransformedDistribution(
            base, [ReshapeTransform(torch.Size([math.prod(shape)]), torch.Size(shape))]
        )
    return _to_support(site, base)


def _normal(site: SiteInfo) -> Head:
    shape = free_shape(site)

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return _to_support(site, dist.Normal(outputs["loc"], outputs["scale"]).to_event(len(shape)))

    return Head((Output("loc", shape), Output("scale", shape, constraints.positive)), build)


def _low_rank(site: SiteInfo, rank: int = 2) -> Head:
    """Covariance W Wᵀ + diag(d)."""
    size = math.prod(free_shape(site))

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        base = dist.LowRankMultivariateNormal(outputs["loc"], outputs["factor"], outputs["diagonal"])
        return _from_vector(site, base)

    outputs = (
        Output("loc", (size,)),
        Output("factor", (size, rank), spread=0.1),  # 0 is a saddle
        Output("diagonal", (size,), constraints.positive),
    )
    return Head(outputs, build)


def _full(site: SiteInfo) -> Head:
    size = math.prod(free_shape(site))

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return _from_vector(site, dist.MultivariateNormal(outputs["loc"], scale_tril=outputs["scale_tril"]))

    scale_tril = Output("scale_tril", (size, size), constraints.lower_cholesky)
    return Head((Output("loc", (size,)), scale_tril), build)


def _elementwise(family: Any, **outputs: Constraint) -> Callable[[SiteInfo], Head]:
    """A head of independent elements, each with its own parameters."""

    def head(site: SiteInfo) -> Head:
        def build(values: Outputs, data: Mapping[str, Tensor]) -> Any:
            return family(**values).to_event(len(site.event_shape))

        return Head(tuple(Output(n, site.event_shape, c) for n, c in outputs.items()), build)

    return head


def _dirichlet(site: SiteInfo) -> Head:
    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return dist.Dirichlet(outputs["concentration"]).to_event(len(site.event_shape) - 1)

    return Head((Output("concentration", site.event_shape, constraints.positive),), build)


def _point(site: SiteInfo) -> Head:
    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return dist.Delta(outputs["point"], event_dim=len(site.event_shape))

    return Head((Output("point", site.event_shape, continuous_support(site)),), build)


def _flow(
    site: SiteInfo,
    flow: str = "nsf",
    context: int = 8,
    transforms: int = 2,
    flow_hidden: Sequence[int] = (32,),
) -> Head:
    """An autoregressive flow given a context: λ is the context, the flow's weights are shared by all data."""
    from lvmppl.flows import FlowDistribution, build_flow

    size = math.prod(free_shape(site))
    module = build_flow(flow, size, context, transforms, flow_hidden)

    def build(outputs: Outputs, data: Mapping[str, Tensor]) -> Any:
        return _from_vector(site, FlowDistribution(module(outputs["context"])))

    return Head((Output("context", (context,), spread=0.1),), build, module=module)


# --------------------------------------------------------------------------------------------------------- table

_CONTINUOUS = frozenset({"real", "positive", "unit_interval", "simplex", "other"})
_FINITE = frozenset({"binary", "finite", "one_hot"})

HEADS: dict[str, HeadKind] = {
    "categorical": HeadKind(_categorical, _FINITE, "enumeration", "a probability for every state"),
    "bernoulli": HeadKind(_bernoulli, frozenset({"binary"}), "enumeration", "the probability of 1"),
    "independent_categoricals": HeadKind(
        _independent_categoricals,
        frozenset({"chain"}),
        "enumeration",
        "a sequence whose steps are independent",
    ),
    "chain": HeadKind(
        _chain, frozenset({"chain"}), "enumeration", "a sequence as an inhomogeneous Markov chain"
    ),
    "normal": HeadKind(_normal, _CONTINUOUS, "pathwise", "independent Gaussians"),
    "low_rank": HeadKind(
        _low_rank, _CONTINUOUS, "pathwise", "a Gaussian of covariance W Wᵀ + diag(d)", ("rank",)
    ),
    "full": HeadKind(_full, _CONTINUOUS, "pathwise", "a Gaussian with full covariance"),
    "lognormal": HeadKind(
        _elementwise(dist.LogNormal, loc=constraints.real, scale=constraints.positive),
        frozenset({"positive"}),
        "pathwise",
        "independent log-normals",
    ),
    "gamma": HeadKind(
        _elementwise(dist.Gamma, concentration=constraints.positive, rate=constraints.positive),
        frozenset({"positive"}),
        "pathwise",
        "independent gammas",
        twice=False,
    ),
    "beta": HeadKind(
        _elementwise(dist.Beta, concentration1=constraints.positive, concentration0=constraints.positive),
        frozenset({"unit_interval"}),
        "pathwise",
        "independent betas",
        twice=False,
    ),
    "dirichlet": HeadKind(_dirichlet, frozenset({"simplex"}), "pathwise", "a Dirichlet", twice=False),
    "point": HeadKind(_point, _CONTINUOUS, "pathwise", "one value (MAP); its ELBO is log p(x, z), no bound"),
    "flow": HeadKind(
        _flow,
        _CONTINUOUS,
        "pathwise",
        "an autoregressive normalizing flow (extra `flows`)",
        ("flow", "context", "transforms", "flow_hidden"),
    ),
    "summed": HeadKind(
        None, _FINITE | {"chain"}, "enumeration", "left out of q: summed exactly under the model"
    ),
}

DEFAULT_HEADS: dict[str, str] = {
    "binary": "categorical",
    "finite": "categorical",
    "one_hot": "categorical",
    "chain": "chain",
    "real": "normal",
    "positive": "lognormal",
    "unit_interval": "beta",
    "simplex": "dirichlet",
    "other": "normal",
}


def build_head(site: SiteInfo, name: str | None, settings: Mapping[str, Any]) -> Head | None:
    """The head of one site by name, or the default one of its support; None if the site is left out of q.

    Raises:
        InputError: no such head or setting, or a head that does not serve the site's support; the message says why.
    """
    where, kind = f"guide, head of site '{site.name}'", support_kind(site)
    if name is None and kind not in DEFAULT_HEADS:
        fixes = {
            "discrete_vector": "declare its axes with pyro.plate instead of .to_event, so that each is a site of its own",
            "countable": "sum it out of the model by hand, or truncate it to a Categorical",
        }
        raise InputError(where, "a support that a head serves", support_words(kind), fixes[kind])
    name = DEFAULT_HEADS[kind] if name is None else name
    if name not in HEADS:
        raise InputError(where, f"one of {', '.join(HEADS)}", repr(name))
    row = HEADS[name]
    if kind not in row.supports:
        serving = ", ".join(n for n, h in HEADS.items() if kind in h.supports)
        raise InputError(
            where,
            f"a head for {support_words(kind)} ({site.family})",
            f"{name}, which is for {support_words(row.supports)}",
            f"use {serving}" if serving else "no head serves this support",
        )
    unknown = [s for s in settings if s not in row.settings]
    if unknown:
        known = f"settings {', '.join(row.settings)}" if row.settings else "no settings"
        raise InputError(f"{where}: {name}", known, ", ".join(unknown), "leave it out")
    return None if row.build is None else row.build(site, **settings)


__all__ = [
    "DEFAULT_HEADS",
    "HEADS",
    "Head",
    "HeadKind",
    "Output",
    "build_head",
    "continuous_support",
    "free_shape",
    "num_states",
    "support_kind",
    "support_words",
]
