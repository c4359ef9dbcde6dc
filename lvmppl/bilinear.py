"""Log-densities as matrix products: parameters along some batch axes, data along others.

A mixture's factor log p(x⁽ⁿ⁾ | z = k) has parameters that differ by k and data that differ by n. Broadcast, it takes
N × K × D entries; as a member of an exponential family it is

    f[k, n] = ⟨η_k, t(x⁽ⁿ⁾)⟩ − A(η_k) + log h(x⁽ⁿ⁾) = (H T)[k, n]

with a column of statistics T a datum and a row of natural parameters H (−A among them) a state. T is made piece by piece
while it fits the cache, and again in the backward pass, so that nothing larger than the result is ever kept. The product
is linear in H; all else that θ goes through is as small as θ.

`log_density` looks at shapes alone: of every batch axis the parameters or the value must have size 1. Where that fails,
or where expanding a square would lose digits, the element-wise density of `lvmppl.families` is used.

Shapes: P entries of the parameters' batch axes, N of the value's, E event entries, t statistics, V categories.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvmppl import families
from lvmppl.families import log_table, safe_log, unexpanded
from lvmppl.family_table import FAMILIES, Family

SMALLEST = 1 << 14  # entries of the broadcast below which a matrix product saves nothing
PIECE = 1 << 18  # entries of T made at once: 2 MiB in float64
DIGITS_KEPT = 4e5  # largest squared distance from the centre, in variances: 1e-16 of it stays below 1e-10

LOG_2PI = math.log(2 * math.pi)
_LINEAR = (
    dist.Bernoulli,
    dist.Binomial,
    dist.Geometric,
    dist.NegativeBinomial,
    dist.Poisson,
    dist.Exponential,
    dist.Gamma,
    dist.Multinomial,
)
_CENTRED = ("normal", "mvn")
_CORE = {"mvn": 1, "simplex": 1}


def log_density(fn: Any, value: Tensor) -> Tensor:
    """log p(value) of a Pyro distribution, broadcastable to its batch shape (nats), by a matrix product where it is one.

    The same numbers as `families.log_density` to 1e-10 relative in float64; in float32 the product is computed in
    float64. Zeros are exact: probability 0 is −∞.
    """
    if isinstance(fn, dist.MaskedDistribution):
        base = log_density(fn.base_dist, value)
        zero = torch.zeros((), dtype=base.dtype, device=base.device)
        return torch.where(torch.as_tensor(fn._mask), base, zero)
    plan = _plan(fn, value)
    product = None if plan is None else _as_product(plan)
    return families.log_density(fn, value) if product is None else product


# ------------------------------------------------------------------------------------------- shapes and statistics


@dataclass(frozen=True)
class _Plan:
    """A distribution and a value whose batch axes are disjoint.

    left, right: batch shapes of parameters and value, padded to one rank; events: of each, the event axes that
    `Independent` declares.
    """

    fn: Any
    family: Family
    value: Tensor
    left: tuple[int, ...]
    right: tuple[int, ...]
    events: tuple[int, ...]

    @property
    def core(self) -> int:
        return _CORE.get(self.family.kind, 0)

    @property
    def is_label(self) -> bool:
        return isinstance(self.fn, td.Categorical)

    def rows(self, parameter: Tensor, core: int = 0) -> Tensor:
        """A parameter [P, E, *core]."""
        parameter = unexpanded(parameter, core)
        tail = parameter.shape[parameter.dim() - core :]
        full = parameter.expand(*self.left, *self.events, *tail)
        return full.reshape(prod(self.left), prod(self.events), *tail)

    def columns(self, statistic: Tensor) -> Tensor:
        """A statistic of the value [N, E]."""
        tail = statistic.shape[statistic.dim() - self.core :] if self.core else ()
        return statistic.expand(*self.right, *self.events, *tail).reshape(prod(self.right), -1)

    def base(self, log_base: Tensor) -> Tensor:
        """Σ_e log h(x) [N]."""
        return log_base.expand(*self.right, *self.events).reshape(prod(self.right), -1).sum(-1)

    def shaped(self, product: Tensor) -> Tensor:
        """[P, N] with every axis back in its place."""
        rank = len(self.left)
        shape = [max(a, b) for a, b in zip(self.left, self.right, strict=True)]
        wide = [i for i in range(rank) if self.left[i] > 1]
        if all(self.right[i] == 1 for i in range(max(wide, default=0))):
            return product.reshape(shape)
        order = [axis for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for axis in pair]
        return product.reshape(*self.left, *self.right).permute(order).reshape(shape)


def _plan(fn: Any, value: Tensor) -> _Plan | None:
    if value.requires_grad and torch.is_grad_enabled():
        return None
    rank = 0
    while isinstance(fn, dist.Independent | td.Independent):
        rank += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
    kind = type(fn)
    is_label = kind is dist.Categorical or kind is dist.OneHotCategorical
    if kind is dist.OneHotCategorical:
        fn, value = fn._categorical, value.argmax(-1)
    family = FAMILIES.get(kind)
    if family is None or (is_label and rank == 0):  # a single label is looked up in its table
        return None
    if not is_label and family.kind not in _CENTRED and not isinstance(fn, _LINEAR):
        return None
    core = 0 if is_label else _CORE.get(family.kind, 0)
    if (family.kind == "mvn" and rank) or fn.batch_shape.numel() * max(
        1, value.shape[-1] if core else 1
    ) < SMALLEST:
        return None
    if getattr(value, "_pyro_categorical_support", None) is not None:
        return None
    parameters = list(_parameters(fn, family))
    events = tuple(fn.batch_shape[len(fn.batch_shape) - rank :])
    left = _batch([(unexpanded(t, c), c + rank) for t, c in parameters])
    right = _batch(
        [(unexpanded(value, core), core + rank), *((unexpanded(k), rank) for k in family.known(fn).values())]
    )
    if left is None or right is None:
        return None
    axes = max(len(left), len(right))
    left, right = (1,) * (axes - len(left)) + left, (1,) * (axes - len(right)) + right
    shared = any(a > 1 and b > 1 for a, b in zip(left, right, strict=True))
    width = prod(events) * prod(value.shape[value.dim() - core :])
    scalar = family.kind == "normal" and width == 1  # nothing to sum over
    if shared or scalar or prod(left) == 1 or prod(left) * prod(right) * width < SMALLEST:
        return None
    own = value.shape[value.dim() - core - rank : value.dim() - core] if rank else ()
    if tuple(own) != events:
        return None
    if fn._validate_args and not _is_supported(fn, value):
        fn._validate_sample(value)  # raises torch's own message
    return _Plan(fn, family, value, left, right, events)


def _parameters(fn: Any, family: Family) -> Iterator[tuple[Tensor, int]]:
    """The distribution's parameter tensors, as they are, and how many of their last axes are not batch axes."""
    if family.kind == "mvn":
        yield fn.loc, 1
        yield fn._unbroadcasted_scale_tril, 2
    elif family.kind == "simplex":
        own = getattr(fn, "_categorical", fn)
        yield (own.probs if "probs" in own.__dict__ else own.logits), 1
    elif family.kind == "normal":
        yield fn.loc, 0
        yield fn.scale, 0
    elif family.kind == "beta":
        yield (fn.probs if "probs" in fn.__dict__ else fn.logits), 0
    else:
        yield fn.rate, 0


def _batch(tensors: Sequence[tuple[Tensor, int]]) -> tuple[int, ...] | None:
    """The broadcast batch shape of tensors, each with a number of last axes that do not count."""
    try:
        return tuple(broadcast_shape(*(t.shape[: max(0, t.dim() - skip)] for t, skip in tensors)))
    except ValueError:
        return None


def _is_supported(fn: Any, value: Tensor) -> bool:
    """Whether every value lies in the support, without broadcasting it to the parameters' batch axes."""
    if isinstance(fn, td.Binomial):
        support: Any = constraints.integer_interval(0, unexpanded(fn.total_count))
    elif isinstance(fn, td.Multinomial):
        support = constraints.multinomial(fn.total_count)
    elif isinstance(fn, td.Categorical):
        support = constraints.integer_interval(
            0, (fn.probs if "probs" in fn.__dict__ else fn.logits).shape[-1] - 1
        )
    else:
        support = fn.support
    return bool(support.check(value).all())


# ------------------------------------------------------------------------------------------------------- products


def _as_product(plan: _Plan) -> Tensor | None:
    if plan.is_label:
        return plan.shaped(_labels(plan))
    kind = plan.family.kind
    if kind in _CENTRED:
        return _quadratic(plan)
    known = {k: unexpanded(v) for k, v in plan.family.known(plan.fn).items()}
    value = plan.value.to(_dtype(plan))
    parts = tuple(plan.columns(p) for p in plan.family.statistics(value, known))
    natural = torch.cat([row.flatten(1) for row in _linear_natural(plan)], -1)  # [P, t]
    product = inner(natural, Design("linear", parts))
    if plan.family.base is not None:
        product = product + plan.base(plan.family.base(value, known))
    return plan.shaped(product)


def _dtype(plan: _Plan) -> torch.dtype:
    return next(_parameters(plan.fn, plan.family))[0].dtype


def _linear_natural(plan: _Plan) -> list[Tensor]:
    """η by the statistics it meets: (log p, log(1 − p)), (log τ, −τ) or the row of log p."""
    fn, kind = plan.fn, plan.family.kind
    if kind == "simplex":
        return [plan.rows(log_table(fn._categorical), 1)]
    if kind == "gamma":
        rate = plan.rows(fn.rate)
        return [safe_log(rate), -rate]
    if "probs" in fn.__dict__:
        probs = plan.rows(fn.probs)
        return [safe_log(probs), safe_log(1 - probs)]
    logits = plan.rows(fn.logits)
    return [torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)]


def _quadratic(plan: _Plan) -> Tensor | None:
    """Normal and multivariate normal about the mean of the data; None where squares would lose digits."""
    fn, kind = plan.fn, plan.family.kind
    (value,) = plan.family.statistics(plan.value, {})
    x = plan.columns(value)
    centre = x.mean(0)
    low, high = torch.aminmax(x, dim=0)
    reach = torch.maximum(high - centre, centre - low).double()  # [E]
    if kind == "normal":
        precision = plan.rows(fn.scale).double() ** -2  # [P, E]
        loc = plan.rows(fn.loc)
        rows = normal_natural(loc.double() - centre.double(), precision)
        sharpness = precision
    else:
        root = plan.rows(fn._unbroadcasted_scale_tril, 2).double().squeeze(1)  # [P, E, E]
        rows, whitener = mvn_natural(plan.rows(fn.loc, 1).squeeze(1).double() - centre.double(), root)
        skeel = (
            (whitener.abs() @ root.abs()).sum(-1).amax(-1, keepdim=True)
        )  # digits lost in inverting the root
        sharpness = whitener.square().sum(-2) * skeel.detach()
    if not bool((sharpness.detach() * reach.square()).sum(-1).max() <= DIGITS_KEPT):
        plain = kind == "mvn" and not torch.is_grad_enabled() and x.dtype == torch.float64
        return plan.shaped(_whitened(x - centre, plan, centre, root, whitener)) if plain else None
    product = inner(torch.cat(rows, -1), Design(kind, (x,), centre))
    if plan.family.base is not None:
        product = product + plan.base(plan.family.base(plan.value, {}))
    return plan.shaped(product.to(_dtype(plan)))


def _whitened(y: Tensor, plan: _Plan, centre: Tensor, root: Tensor, whitener: Tensor) -> Tensor:
    """log N(x; m_p, L_p L_pᵀ) [P, N] as −½ |L⁻¹ y − L⁻¹(m − c)|²: only the digits of y, not of its square, are lost."""
    size = y.shape[-1]
    shift = (whitener @ (plan.rows(plan.fn.loc, 1).squeeze(1) - centre).unsqueeze(-1)).flatten()  # [P E]
    columns = whitener.reshape(-1, size).T  # [E, P E]
    constant = -(2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + size * LOG_2PI) / 2
    result = y.new_empty(len(root), len(y))
    for begin in range(0, len(y), rows := max(1, _CACHED // (len(root) * size))):
        white = (y[begin : begin + rows] @ columns).sub_(shift).square_()
        torch.sub(
            constant,
            white.unflatten(-1, (len(root), size)).sum(-1),
            alpha=0.5,
            out=result.T[begin : begin + rows],
        )
    return result


_CACHED = 2**17  # entries of a piece: 1 MiB


def normal_natural(m: Tensor, precision: Tensor) -> list[Tensor]:
    """[…, 1], […, E], […, E]: −A, τ m and −τ/2 of normals with means m from the centre and precisions τ [..., E]."""
    constant = (precision.log() - precision * m.square() - LOG_2PI) / 2
    return [constant.sum(-1, keepdim=True), precision * m, -precision / 2]


def mvn_natural(m: Tensor, root: Tensor) -> tuple[list[Tensor], Tensor]:
    """−A, Σ⁻¹ m and the entries i ≤ j of −Σ⁻¹/2 (off the diagonal twice), Σ = L Lᵀ; and L⁻¹. m [..., E], L [..., E, E]."""
    size, whitener = m.shape[-1], whitener_of(root)
    precision = whitener.mT @ whitener
    white = (whitener @ m.unsqueeze(-1)).squeeze(-1)
    linear = (whitener.mT @ white.unsqueeze(-1)).squeeze(-1)
    log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = -(white.square().sum(-1) + log_det + size * LOG_2PI) / 2
    upper, weights = _upper(size, m.dtype)
    entries = precision.flatten(-2).index_select(-1, upper) * weights
    entries = entries.expand(*m.shape[:-1], entries.shape[-1])
    return [constant.unsqueeze(-1), linear, entries], whitener


def whitener_of(root: Tensor) -> Tensor:
    """L⁻¹ of lower triangles [..., E, E]."""
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root, eye, upper=False)
    return inverse


@functools.lru_cache(maxsize=64)
def _upper(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the entries i ≤ j of a matrix: where its flattened rows have them, and −½ on the diagonal, −1 off it."""
    i, j = torch.triu_indices(size, size)
    return i * size + j, torch.where(i == j, -0.5, -1.0).to(dtype)


def _labels(plan: _Plan) -> Tensor:
    """Σ_e log p[p, e, x[n, e]]: a look-up an event entry, added up."""
    table = plan.rows(log_table(plan.fn), 1)  # [P, E, V]
    labels = plan.value.long().expand(*plan.right, *plan.events).reshape(prod(plan.right), -1)
    total: Tensor | None = None
    for entry, row in zip(labels.unbind(1), table.unbind(1), strict=True):
        picked = row.index_select(-1, entry)
        total = picked if total is None else total + picked
    assert total is not None
    return total


# --------------------------------------------------------------------------------------------- the design and H T


@dataclass(frozen=True)
class Design:
    """The statistics T [t, N] of data [N, E], made some rows at a time.

    kind: `linear` (the parts themselves), `normal` (1, y, y²) or `mvn` (1, y, y_i y_j for i ≤ j), y the data from the
    centre.
    """

    kind: str
    parts: tuple[Tensor, ...]
    centre: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.parts[0].shape[0]

    @property
    def width(self) -> int:
        size = self.parts[0].shape[1]
        if self.kind == "linear":
            return size * len(self.parts)
        return 1 + size + (size if self.kind == "normal" else size * (size + 1) // 2)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows and their T [t, n] in float64; the tensor is overwritten by the next piece."""
        step = max(64, PIECE // self.width)
        buffer = torch.empty(
            self.width * min(step, self.rows), dtype=torch.float64, device=self.parts[0].device
        )
        for begin in range(0, self.rows, step):
            where = slice(begin, min(begin + step, self.rows))
            out = buffer[: self.width * (where.stop - begin)].view(self.width, -1)
            self._fill(where, out)
            yield where, out

    def _fill(self, where: slice, out: Tensor) -> None:
        if self.kind == "linear":
            at = 0
            for part in self.parts:
                out[at : at + part.shape[1]].copy_(part[where].T)
                at += part.shape[1]
            return
        (x,) = self.parts
        assert self.centre is not None
        statistics(x[where].T, self.centre.unsqueeze(-1), self.kind, out)


def statistics(x: Tensor, centre: Tensor, kind: str, out: Tensor) -> None:
    """1, y = x − c, and y² or y_i y_j, into `out` [t, n]; x [E, n] and c are subtracted as they are."""
    width = x.shape[0]
    out[0] = 1.0
    y = out[1 : 1 + width]
    y.copy_(x)
    y -= centre
    if kind == "normal":
        torch.mul(y, y, out=out[1 + width :])
    else:
        packed_outer(y, out[1 + width :])


def packed_outer(y: Tensor, out: Tensor) -> None:
    """y_i y_j for i ≤ j, row by row: y [E, n], out [E(E + 1)/2, n]."""
    at = 0
    for i in range(len(y)):
        torch.mul(y[i:], y[i], out=out[at : at + len(y) - i])
        at += len(y) - i


class _Inner(torch.autograd.Function):
    """H T, with T made anew in the backward pass. Linear in H, so that every further derivative is autograd's."""

    @staticmethod
    def forward(ctx: Any, natural: Tensor, design: Design) -> Tensor:
        ctx.design, ctx.dtype = design, natural.dtype
        h = natural.double()
        out = natural.new_empty(len(natural), design.rows)
        exact = natural.dtype == torch.float64
        for where, t in design.pieces():
            if exact:
                torch.mm(h, t, out=out[:, where])
            else:
                out[:, where] = h @ t
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        if torch.is_grad_enabled() and grad.requires_grad:
            whole = torch.cat([t.clone() for _, t in ctx.design.pieces()], 1)
            return (grad.double() @ whole.T).to(ctx.dtype), None
        total = torch.zeros(len(grad), ctx.design.width, dtype=torch.float64, device=grad.device)
        for where, t in ctx.design.pieces():
            total.addmm_(grad[:, where].double(), t.T)
        return total.to(ctx.dtype), None


def inner(natural: Tensor, design: Design) -> Tensor:
    """H T [P, N] of natural parameters H [P, t]; 0 · (−∞) = 0."""
    impossible = natural == -torch.inf
    if not bool(impossible.any()):
        return _product(natural, design)
    plain = _product(torch.where(impossible, 0.0, natural), design)
    with torch.no_grad():
        hit = _product(
            impossible.to(natural.dtype), design
        )  # statistics that meet a −∞ are counts, never negative
        penalty = torch.where(hit > 0, -torch.inf, 0.0)
    return plain + penalty


def _product(natural: Tensor, design: Design) -> Tensor:
    result: Tensor = _Inner.apply(natural, design)  # type: ignore[no-untyped-call]
    return result
