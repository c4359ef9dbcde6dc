"""How the continuous sites of a model make up one vector a row, and which of the other sites are its configurations.

The sites of one row are stacked into z⁽ⁿ⁾ ∈ ℝᵈ. Rows: a row per datum where every latent site lies in the data plate; one
row for everything otherwise. Shapes: C = (C₁, …) enumerated sites, N data, d dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributions import CatTransform, Transform, biject_to, constraints, identity_transform

from lvmppl.density import Evaluation, Factor, Joint, SiteInfo
from lvmppl.errors import IntractableError
from lvmppl.exact.ends import support_of_a_row
from lvmppl.exact.named import Named
from lvmppl.exact.scales import UNIT, same_scale, scale_of
from lvmppl.wording import abridged

MAX_CONFIGURATIONS = 4096
QUADRATURE_DIMS = 3


@dataclass(frozen=True)
class Block:
    """One continuous site's place in the stacked vector."""

    name: str
    begin: int
    size: int
    inner: tuple[str, ...]  # plates, besides the data plate of a row per datum, whose elements are stacked
    event_shape: tuple[int, ...]

    @property
    def columns(self) -> range:
        return range(self.begin, self.begin + self.size)


@dataclass(frozen=True)
class Layout:
    """How continuous sites make up z [*rows, d], and which enumerated sites index its configurations.

    discrete: in the order of the leading axes of rows. local: a row per datum. summed: enumerated sites that are summed
    out at every point instead, as their joint states are too many to list: chains, and sites in plates within a row.
    scale: what log p(x) of a row is multiplied by, a number or over the data plate. outer: those of `discrete` that stand
    outside of the data plate and that rows, which are data, share.
    """

    blocks: tuple[Block, ...]
    dim: int
    discrete: tuple[str, ...]
    discrete_sizes: tuple[int, ...]
    local: bool
    plate_sizes: Mapping[str, int]
    transform: Transform | None
    summed: tuple[str, ...] = ()
    scale: Named = UNIT
    outer: tuple[str, ...] = ()

    def home(self, data_plate: str | None) -> tuple[str, ...]:
        """The data plate where rows are data."""
        return (data_plate,) if self.local and data_plate is not None else ()

    def rows(self, data_plate: str | None) -> tuple[int, ...]:
        tail = (self.plate_sizes[p] for p in self.home(data_plate))
        return (*self.discrete_sizes, *tail) or (1,)


def layout_of(joint: Joint, evaluation: Evaluation) -> Layout:
    """Stack the continuous sites.

    evaluation: one pass of the model, from which sizes of plates and enumerated sites are read.

    Raises:
        IntractableError: discrete sites that are not enumerated, or plates that couple rows in a way that is not handled.
    """
    structure = joint.structure
    plate = structure.data_plate
    latents = [s for s in structure.sites.values() if s.kind == "latent"]
    unmarked = [s for s in latents if s.finite]
    if unmarked:
        raise _intractable(
            unmarked,
            "discrete sites that are not marked for enumeration in parallel",
            f"write infer={{'enumerate': 'parallel'}} in pyro.sample('{unmarked[0].name}', …)",
        )
    stuck = [s for s in latents if s.discrete]
    if stuck:
        raise _intractable(
            stuck,
            "discrete sites whose states cannot be listed",
            "truncate an unbounded one to a Categorical, declare entries by pyro.plate instead of .to_event, or use svi",
        )
    masses = [s for s in latents if s.family == "Delta"]
    if masses:
        raise _intractable(
            masses,
            "a point mass, which has no density to integrate",
            "make it a pyro.param or pyro.deterministic",
        )
    enumerated = [structure.sites[n] for n in structure.enumerated]
    local = plate is not None and all(plate in s.plates for s in latents)
    outer = [s for s in enumerated if plate not in s.plates]
    single = all(evaluation.variables[s.name].steps is None and not s.plates for s in outer)
    chains = [s for s in enumerated if evaluation.variables[s.name].steps is not None]
    states = math.prod(1 if s in chains else evaluation.variables[s.name].size for s in enumerated)
    many = bool(chains) or states > MAX_CONFIGURATIONS
    if outer and (many or not single or any(s.plates != (plate,) for s in enumerated if s not in outer)):
        local = False
    home: set[str] = {plate} if local and plate is not None else set()
    within = any(set(s.plates) - home for s in enumerated)
    summed = tuple(structure.enumerated) if many or within else ()
    blocks, begin, transforms, lengths = [], 0, [], []
    for site in latents:
        inner = tuple(p for p in site.plates if p not in home)
        size = math.prod(evaluation.plate_sizes[p] for p in inner) * math.prod(site.event_shape)
        blocks.append(Block(site.name, begin, size, inner, site.event_shape))
        transforms.append(_transform(site, joint, inner))
        lengths.append(size)
        begin += size
    if states > MAX_CONFIGURATIONS and begin > QUADRATURE_DIMS:
        raise _intractable(
            enumerated,
            f"{states:,} configurations (at most {MAX_CONFIGURATIONS:,}) beside more than {QUADRATURE_DIMS} dimensions",
            "use vem or svi",
        )
    plain = all(t is identity_transform for t in transforms)
    whole = (
        None if plain else transforms[0] if len(transforms) == 1 else CatTransform(transforms, -1, lengths)
    )
    names = () if summed else tuple(reversed(structure.enumerated))  # later sites are enumerated further left
    sizes = tuple(evaluation.variables[n].size for n in names)
    scale = _row_scale(latents, evaluation, joint, home)
    shared = tuple(n for n in names if local and n in {s.name for s in outer})
    return Layout(
        tuple(blocks), begin, names, sizes, local, evaluation.plate_sizes, whole, summed, scale, shared
    )


def _row_scale(latents: list[SiteInfo], evaluation: Evaluation, joint: Joint, home: set[str]) -> Named:
    """The one scale of the continuous sites and all that stands in their plates or around them.

    A factor in a plate inside of theirs may carry another, which then multiplies it before they are integrated out.

    Raises:
        IntractableError: they differ, or a scale varies within a row; names the sites.
    """
    inside = {p for s in latents for p in s.plates}
    names = [s.name for s in latents]
    own = [f for f in evaluation.factors if f.site.removesuffix("·transition") in names]
    scale = scale_of(own[0])
    meeting = [f for f in evaluation.factors if f.plates <= inside and not is_prior(f, joint)]
    if home:
        meeting = [f for f in meeting if home <= f.plates]
    for factor in (*own, *meeting):
        if not same_scale(scale_of(factor), scale) or set(scale.dims) - home:
            what = "another" if factor.site not in names else "one of its own"
            raise _intractable(
                latents,
                f"site '{factor.site}' carries {what} scale, and a scale acts after they are integrated",
                "put poutine.scale around all of these sites, or around a whole plate inside theirs",
            )
    return scale


def _transform(site: SiteInfo, joint: Joint, inner: tuple[str, ...]) -> Transform:
    """ℝ → support, elementwise in the stacked entries of one row."""
    support = support_of_a_row(joint.structure, site, inner)
    if site.circular:
        support = constraints.interval(-math.pi, math.pi)
    if support is constraints.real or support is constraints.real_vector:
        return identity_transform
    transform: Transform = biject_to(support)
    if transform.domain.event_dim or transform.codomain.event_dim:
        raise _intractable([site], f"a support ({support}) whose coordinates are tied", "use vem or svi")
    return transform


def _intractable(sites: list[SiteInfo], what: str, fix: str) -> IntractableError:
    listing = abridged(f"{s.name} ({s.family})" for s in sites)
    return IntractableError(
        "exact posterior", "latent sites that can be summed or integrated", f"{listing}: {what}", fix
    )


def is_constant(factor: Factor, joint: Joint, layout: Layout) -> bool:
    """Whether a factor belongs to no row: a prior of parameters, or outside of the data plate while every latent site is
    within."""
    return is_prior(factor, joint) or (layout.local and joint.structure.data_plate not in factor.plates)


def is_prior(factor: Factor, joint: Joint) -> bool:
    return (
        joint.structure.sites[factor.site].kind == "parameter"
        if factor.site in joint.structure.sites
        else False
    )
