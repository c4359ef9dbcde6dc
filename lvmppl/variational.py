"""Any head with any source: a guide for a model, q(z; λ) = Π_sites q_site(z_site; λ_site).

The sites, their supports and their plates are read from the model, so one guide serves every model. A site inside the
data plate takes its λ⁽ⁿ⁾ from the source; one outside has a single λ.

Semi-amortized inference (Kim et al. 2018): an encoder's λ⁽ⁿ⁾, then a few steps of gradient ascent on the ELBO of its own
datum. The steps need the ELBO, which a guide does not know: `refine_steps`, `refine_rate`, `through`, `local` and
`holding` are what the algorithms need to take them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
from torch import Tensor, nn

from lvmppl.density import SiteInfo, Structure, describe
from lvmppl.errors import InputError
from lvmppl.estimators import valid_estimators
from lvmppl.heads import DEFAULT_HEADS, HEADS, Head, Output, build_head, support_kind, support_words
from lvmppl.sources import SOURCES, Encoder, SourceSettings

Model = Callable[..., Any]
HeadSpec = str | Mapping[str, Any]
Heads = HeadSpec | Mapping[str, HeadSpec] | None


@dataclass(frozen=True)
class _Latent:
    """A site of the guide: its head, and the axis and size of each plate it stands in."""

    site: SiteInfo
    head: Head
    plates: Mapping[str, tuple[int, int]]  # (axis, size when all rows are handed in)
    data_plate: str | None

    @property
    def local(self) -> bool:
        return self.data_plate in self.plates

    def batch_shape(self, rows: int) -> list[int]:
        """The axes of its plates, the data plate with the rows handed in."""
        shape = [1] * max((-axis for axis, _ in self.plates.values()), default=0)
        for name, (axis, size) in self.plates.items():
            shape[axis] = rows if name == self.data_plate else size
        return shape

    @property
    def inner(self) -> list[int]:
        """The batch axes other than the data plate's."""
        axis = self.plates[str(self.data_plate)][0]
        shape = self.batch_shape(0)
        return [size for i, size in enumerate(shape) if i - len(shape) != axis]

    def placed(self, value: Tensor) -> Tensor:
        """[B, *inner, *event] with the rows moved to the axis of the data plate."""
        axis = self.plates[str(self.data_plate)][0]
        return value.movedim(0, len(self.inner) + 1 + axis)


class Variational(nn.Module):
    """A variational family for a model, from heads and a source.

    head: a name of `lvmppl.heads.HEADS` for every site, or by site a name or {use: name, setting: value}; sites that are
    not named get the default of their support. source: a name of `lvmppl.sources.SOURCES` for the sites in the data
    plate. only: the sites of q by a predicate (the others must be enumerated by the model, or q is refused).
    refine_steps: steps of ascent from an encoder's λ, 0 for none; refine_rate: their size; through: whether the gradient
    of the encoder runs through them.

    λ of a table is `<site>_<output>`, with the data plate's rows where the site stands in it.

    Raises:
        InputError: a head that does not serve its site, a source that cannot read the data; at the first call.
    """

    def __init__(
        self,
        model: Model,
        head: Heads = None,
        source: str = "table",
        settings: SourceSettings | None = None,
        only: Callable[[SiteInfo], bool] | None = None,
        refine_steps: int = 0,
        refine_rate: float = 0.1,
        through: bool = False,
    ) -> None:
        super().__init__()
        check_source(source, refine_steps, refine_rate)
        self._model = [model]  # in a list, so that a module model does not become part of the guide
        self._head, self._source, self._only = head, source, only
        self._settings = settings or SourceSettings()
        self._structure: Structure | None = None
        self._latents: dict[str, _Latent] = {}
        self.encoder: Encoder | None = None
        self.heads = nn.ModuleDict()
        self.local: Mapping[str, Tensor] = {}
        self._held: Mapping[str, Tensor] | None = None
        self.refine_steps, self.refine_rate, self.through = refine_steps, refine_rate, through

    def use_structure(self, structure: Structure) -> None:
        """The model's sites and plates, where they are known already."""
        self._structure = structure

    @contextmanager
    def holding(self, local: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block an encoder's unconstrained λ is what is given here."""
        self._held = local
        try:
            yield
        finally:
            self._held = None

    def forward(self, **data: Tensor) -> None:
        if not self._latents:
            self._prepare(data)
        rows = len(next(iter(data.values())))
        local = self.local = self._encoded(data) if self._held is None else self._held
        plates: dict[str, Any] = {}
        for name, latent in self._latents.items():
            with ExitStack() as stack:
                for plate, (axis, size) in latent.plates.items():
                    if plate not in plates:
                        own = rows if plate == latent.data_plate else size
                        plates[plate] = pyro.plate(plate, own, dim=axis)
                    stack.enter_context(plates[plate])
                outputs = {o.name: self._value(latent, o, rows, local) for o in latent.head.outputs}
                infer: Any = {"enumerate": "parallel"} if latent.head.enumerated else {}
                pyro.sample(name, latent.head.distribution(outputs, data), infer=infer)

    def _value(self, latent: _Latent, output: Output, rows: int, local: Mapping[str, Tensor]) -> Tensor:
        """One output of one site, constrained, with the axes of its plates."""
        key = _key(latent.site.name, output)
        if key in local:
            return output.constrained(latent.placed(local[key]))
        result: Tensor = pyro.param(
            f"{latent.site.name}_{output.name}",
            lambda: output.start(latent.batch_shape(rows)),
            constraint=output.constraint,
            event_dim=len(output.shape),
        )
        return result

    def _encoded(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is None:
            return {}
        wanted = {k: (o, latent.inner) for k, latent, o in self._encodable()}
        result: dict[str, Tensor] = self.encoder(data, wanted)
        return result

    def _encodable(self) -> Iterator[tuple[str, _Latent, Output]]:
        for name, latent in self._latents.items():
            if latent.local:
                for output in latent.head.outputs:
                    yield _key(name, output), latent, output

    def _prepare(self, data: Mapping[str, Tensor]) -> None:
        """Read the model's sites, choose their heads and build the networks, on the first rows."""
        structure = self._structure or describe(self._model[0], data)
        named = _by_site(self._head, structure)
        latents = {}
        for name in structure.latents:
            site = structure.sites[name]
            if self._only is not None and not self._only(site):
                continue
            use, settings = named.get(name, (None, {}))
            head = build_head(site, use, settings)
            if self.refine_steps and self.through and structure.data_plate in site.plates:
                check_through(use or DEFAULT_HEADS[support_kind(site)], name)
            if head is not None:
                plates = {p: (structure.plate_axes[p], structure.plates[p]) for p in site.plates}
                latents[name] = _Latent(site, head, plates, structure.data_plate)
        if not latents:
            found = ", ".join(
                f"{s.name} ({s.family})" for s in structure.sites.values() if s.kind != "observed"
            )
            left = [n for n in structure.latents if named.get(n, ("", {}))[0] == "summed"]
            if left:
                raise InputError(
                    "guide",
                    "a site with a λ",
                    f"{', '.join(left)} alone, summed: left out of q, with nothing to fit",
                    "give a site another head, or fit the exact evidence by em or enumeration",
                )
            fix = "use mean_field, which has a head for every support, or `lvmppl list`" if found else ""
            raise InputError(
                "guide", "a latent site of the model that it serves", found or "no latent site", fix
            )
        self._latents = latents
        for name, latent in latents.items():
            if latent.head.module is not None:
                self.heads[name.replace(".", "_")] = latent.head.module
        if self._source != "table":
            self._build_encoder(data)

    def _build_encoder(self, data: Mapping[str, Tensor]) -> None:
        encodable = list(self._encodable())
        if not encodable:
            raise InputError(
                f"guide, source {self._source}",
                "a latent site in the data plate",
                f"only global sites ({', '.join(self._latents)})",
                "use source: table",
            )
        encoder = Encoder(self._source, data, self._settings)
        for key, latent, output in encodable:
            encoder.add(key, output, latent.inner, data)
        self.encoder = encoder


def check_source(source: str, refine_steps: int, refine_rate: float) -> None:
    """Raises InputError for a source that does not exist, or one that cannot be refined."""
    if source not in SOURCES:
        raise InputError("guide, source", f"one of {', '.join(SOURCES)}", repr(source))
    if refine_steps < 0:
        raise InputError("guide, steps", "a number of at least 0", str(refine_steps))
    if refine_steps and source == "table":
        fix = "use an encoder such as source: mlp, or leave the steps out"
        raise InputError("guide, steps", "an encoder whose λ is refined", "source table", fix)
    if refine_steps and not (refine_rate > 0 and math.isfinite(refine_rate)):
        raise InputError("guide, rate", "a positive number", str(refine_rate))


def check_through(head: str, site: str) -> None:
    """Raises InputError for a head whose draw torch does not differentiate twice."""
    if not HEADS[head].twice:
        others = ", ".join(n for n, h in HEADS.items() if h.twice and HEADS[head].supports <= h.supports)
        raise InputError(
            f"guide, head of site '{site}'",
            "for through: true a draw with a second derivative",
            f"{head}, whose draw torch differentiates once",
            f"set through: false, or use {others}",
        )


def widths(hidden: Sequence[int]) -> tuple[int, ...]:
    """Layer widths, checked."""
    if any(not isinstance(width, int) or isinstance(width, bool) or width < 1 for width in hidden):
        raise InputError("guide, hidden", "a list of positive layer widths", str(list(hidden)))
    return tuple(hidden)


def _by_site(heads: Heads, structure: Structure) -> dict[str, tuple[str | None, dict[str, Any]]]:
    """(head name, settings) by site, from any of the spellings of `head`."""
    if heads is None:
        return {}
    if isinstance(heads, str) or "use" in heads:
        return {name: _one(heads, f"site '{name}'") for name in structure.latents}
    unknown = [n for n in heads if n not in structure.latents]
    if unknown:
        expected = f"latent sites of the model ({', '.join(structure.latents)})"
        raise InputError("guide, head", expected, ", ".join(map(str, unknown)))
    return {name: _one(spec, f"site '{name}'") for name, spec in heads.items()}


def _one(spec: Any, where: str) -> tuple[str | None, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and isinstance(spec.get("use"), str):
        return spec["use"], {k: v for k, v in spec.items() if k != "use"}
    raise InputError(f"guide, head of {where}", "a name, or {use: NAME, setting: value}", repr(spec))


def _key(site: str, output: Output) -> str:
    return f"{site}_{output.name}".replace(".", "_")


def head_estimators(head: str) -> dict[str, frozenset[str]]:
    """The estimators of a head, its default first, and the supports of the head that each serves."""
    kind = HEADS[head]
    if kind.build is None:
        return {}
    served: dict[str, set[str]] = {}
    for support in sorted(kind.supports):
        site = (
            support if kind.gradient == "enumeration" else "point" if head == "point" else "reparameterised"
        )
        for estimator in valid_estimators(site):
            served.setdefault(estimator, set()).add(support)
    return {name: frozenset(supports) for name, supports in served.items()}


def triples() -> list[tuple[str, str, str]]:
    """(head, source, estimator) of everything that goes together, the default estimator of a head first."""
    return [(h, s, e) for h in HEADS for s in SOURCES for e in head_estimators(h)]


def triples_table() -> str:
    """The table of heads, sources and estimators in Markdown: a row a head."""
    valid = {(h, s) for h, s, _ in triples()}
    lines = [f"| {' | '.join(['head', 'q', 'serves', 'estimators', *SOURCES, 'refined'])} |"]
    lines.append("|" + "---|" * (5 + len(SOURCES)))
    for head, kind in HEADS.items():
        estimators = []
        for name, supports in head_estimators(head).items():
            only = "" if supports == kind.supports else f" ({support_words(supports)})"
            estimators.append(f"{name}{only}")
        cells = ["yes" if (head, source) in valid else "no λ" for source in SOURCES]
        cells.append("no λ" if kind.build is None else "yes" if kind.twice else "`through: false`")
        first = [f"`{head}`", kind.text, support_words(kind.supports), ", ".join(estimators) or "none: no λ"]
        lines.append(f"| {' | '.join([*first, *cells])} |")
    return "\n".join(lines) + "\n"
