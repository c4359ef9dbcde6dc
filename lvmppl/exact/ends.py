"""The supports of continuous sites, which must stand still: one change of coordinates serves all points of a row.

A site on (lower, upper) is integrated over ℝ through one transform to that interval. Ends that differ between rows or
states, or that move with another latent site, would leave part of the support out; ends that move with a fitted θ
contribute a term to ∇θ log p(x; θ) that E_post[∇θ log p(x, z; θ)] lacks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from lvmppl.density import Joint, SiteInfo, Structure, Values, unvalidated
from lvmppl.errors import IntractableError

_ENDS = ("lower_bound", "upper_bound")
_FIX = "draw it on a fixed support and compute with it there, such as low + (high - low) * u of u ~ Uniform(0, 1)"


def support_of_a_row(structure: Structure, site: SiteInfo, inner: Collection[str]) -> Any:
    """The support of one entry of a site; ends that differ between the entries of a row stand in a vector over these.

    inner: the plates of the site whose elements make up a row, besides its event.

    Raises:
        IntractableError: the ends differ between rows, or between the states of enumerated sites.
    """
    support = _of_an_entry(site.support)
    ends = {name: getattr(support, name, None) for name in _ENDS}
    if not any(isinstance(end, Tensor) for end in ends.values()):
        return support
    low, high = (_of_a_row(end, structure, site, inner) for end in ends.values())
    if low is None:
        return constraints.less_than(high)
    return constraints.greater_than(low) if high is None else constraints.interval(low, high)


def _of_a_row(end: Any, structure: Structure, site: SiteInfo, inner: Collection[str]) -> Any:
    if not isinstance(end, Tensor):
        return end
    rank = len(site.event_shape)
    own = {structure.plate_axes[p] - rank: structure.plates[p] for p in inner}
    end = end.reshape([1] * (rank - min(own, default=0) - end.dim()) + list(end.shape)).detach()
    for axis in range(-end.dim(), -rank):
        if axis not in own:
            first = end.narrow(axis, 0, 1)
            if bool((end != first).any()):
                raise _moves(site.name, "differs between rows or states")
            end = first
    sizes = [own.get(axis, 1) for axis in range(-end.dim(), -rank)]
    return end.expand([*sizes, *site.event_shape]).flatten()


def check_ends(joint: Joint, data: Values, values: Values, fitted: Collection[str] = ()) -> None:
    """Refuse supports that move with other latent sites or with θ.

    fitted: parameters that will move. Without ends that a model computes nothing is run, else the model twice.

    Raises:
        IntractableError: names the site, what its support moves with, and how it is written otherwise.
    """
    latents = [s for s in joint.structure.sites.values() if s.kind == "latent" and not s.discrete]
    moving = [s.name for s in latents if _ends(s.support)]
    if not moving:
        return
    at = {n: v.detach().requires_grad_(n in fitted) for n, v in values.items()}
    with torch.enable_grad(), unvalidated():
        views = [joint.view(data, at)[0] for _ in range(2)]
    for name in moving:
        first, again = (_ends(v[name].fn.support) for v in views)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            raise _moves(name, "moves with another latent site")
        followed = [n for n in fitted if any(_depends(end, at[n]) for end in first)]
        if followed:
            raise _moves(name, f"moves with a fitted parameter ({', '.join(followed)})")


def _ends(support: Any) -> list[Tensor]:
    """The ends that are tensors, as a model computes them; those of a family are numbers."""
    ends = (getattr(_of_an_entry(support), name, None) for name in _ENDS)
    return [end for end in ends if isinstance(end, Tensor)]


@torch.enable_grad()
def _depends(end: Tensor, parameter: Tensor) -> bool:
    if not end.requires_grad:
        return False
    return torch.autograd.grad(end.sum(), parameter, retain_graph=True, allow_unused=True)[0] is not None


def _of_an_entry(support: Any) -> Any:
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return support


def _moves(site: str, how: str) -> IntractableError:
    where = "exact posterior"
    return IntractableError(
        where, "continuous sites on one fixed support", f"{site}, whose support {how}", _FIX
    )


__all__ = ["check_ends", "support_of_a_row"]
