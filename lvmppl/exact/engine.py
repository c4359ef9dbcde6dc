"""Which exact engine serves a model with continuous latent sites, tried from the most to the least exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lvmppl.continuous_posterior_marginals import Kernel, Path
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import Evaluation, Joint, Values, unvalidated
from lvmppl.errors import IntractableError
from lvmppl.exact.continuous import (
    MAX_DENSE,
    LogJointOfModel,
    constant_part,
)
from lvmppl.exact.ends import check_ends
from lvmppl.exact.evaluation import ImproperPosterior, NotQuadratic
from lvmppl.exact.gaussian import gaussian_posterior
from lvmppl.exact.hidden import modes_of_terms, sums_of
from lvmppl.exact.layout import QUADRATURE_DIMS, Layout, layout_of
from lvmppl.exact.piecewise import Pieces
from lvmppl.exact.quadrature import QuadraturePosterior, quadrature, unconstrained
from lvmppl.exact.secants import BoundsOf
from lvmppl.exact.state_space import state_space_posterior
from lvmppl.exact.summed import summed_probabilities
from lvmppl.exact.term_bounds import bounds_of_factors
from lvmppl.shared_posteriors import SharedPosterior
from lvmppl.summed_posteriors import SummedPosterior, SummedSites
from lvmppl.wording import abridged

_GAUSSIAN = frozenset({"GaussianChain", "Normal", "MultivariateNormal", "LowRankMultivariateNormal", "Delta"})
_OPAQUE = frozenset({"Unit"})  # of pyro.factor: any function of z
SHORT_PATH = 8  # steps from which a sequence of equal sites is tried as a path, in O(T)


def continuous_posterior(joint: Joint, data: Values, values: Values) -> ContinuousPosterior:
    """The exact Gaussian posterior if log p(x, z) is quadratic in z, else quadrature for at most three dimensions a row.

    Raises:
        IntractableError: neither applies; names the sites, their dimensions and what can be used instead.
        ImproperPosterior: the posterior has no finite integral.
    """
    with unvalidated():  # points far from the mode over- and underflow on purpose
        return _continuous_posterior(joint, data, values)


def _continuous_posterior(joint: Joint, data: Values, values: Values) -> ContinuousPosterior:
    evaluation = _probe(joint, data, values)
    check_ends(joint, data, values)
    layout = layout_of(joint, evaluation)
    log_joint = LogJointOfModel(joint, data, values, layout)
    rows = layout.rows(joint.structure.data_plate)
    dtype = evaluation.factors[0].log_prob.dtype
    variables = {n: evaluation.variables[n] for n in (*layout.discrete, *layout.summed)}
    kernel, engine, doubt = _solve(log_joint, rows, layout, dtype)
    constant = constant_part(joint, evaluation, layout).detach()
    if doubt:
        engine += f", an estimate: {doubt}"
    plate = joint.structure.data_plate
    if layout.summed:
        z, weights = kernel.nodes()
        home = layout.home(plate)
        found = summed_probabilities(log_joint.factors, z.detach(), weights, log_joint.entries, home)
        engine += f"; {abridged(layout.summed)} summed out at every point"
        plates = {n: v.plates for n, v in variables.items()}
        summed = SummedSites(log_joint.factors, found, plates, log_joint.entries, home)
        return SummedPosterior(
            kernel,
            layout,
            variables,
            plate,
            engine,
            constant,
            proven=not doubt,
            singly=log_joint.singly,
            summed=summed,
        )
    kind = SharedPosterior if layout.outer else ContinuousPosterior
    return kind(kernel, layout, variables, plate, engine, constant, proven=not doubt, singly=log_joint.singly)


class _Dependent(NamedTuple):
    """A site that depends on the continuous ones, and the summed ones that it depends on too."""

    name: str
    family: str
    given: list[str]

    def __str__(self) -> str:
        return f"site '{self.name}' ({self.family}{f' given {abridged(self.given)}' if self.given else ''})"


def _dependent(log_joint: LogJointOfModel) -> list[_Dependent]:
    rows, dim = log_joint.layout.rows(log_joint.plate), log_joint.layout.dim
    z = (
        torch.linspace(-1.0, 1.0, 2 * dim, device=log_joint.device)
        .reshape(2, *[1] * len(rows), dim)
        .expand(2, *rows, dim)
    )
    transform = log_joint.layout.transform
    sites = log_joint.joint.structure.sites
    found = log_joint.dependent((z if transform is None else transform(z)).requires_grad_())
    return [_Dependent(name, sites[name].family, given) for name, given in found.items() if name in sites]


def _not_gaussian(log_joint: LogJointOfModel) -> list[str]:
    """Sites that depend on the continuous ones and are not Gaussian, or only given a site that is summed out: that log p
    is quadratic at random points is then no proof that it is so everywhere (a narrow second mode may lie between them).
    As little is it one of a function of them by pieces."""
    with torch.enable_grad(), Pieces() as pieces:
        dependent = _dependent(log_joint)
    suspects = [str(s) for s in dependent if s.given or s.family not in _GAUSSIAN]
    return suspects + ([f"a function by pieces ({', '.join(pieces.names)})"] if pieces.names else [])


def _unproven(log_joint: LogJointOfModel) -> str:
    suspects = _not_gaussian(log_joint)
    return f"nothing proves it between those points for {', '.join(suspects)}" if suspects else ""


@dataclass(frozen=True)
class _Search:
    """Where the search for modes starts besides a scan, and what it may overlook all the same."""

    starts: Tensor | None
    opaque: list[str]  # sites that are a function of z and nothing else is known of
    every_term: bool  # of which log p(x, z) is the sum has been climbed by itself
    bounds: BoundsOf | None = (
        None  # by which a scan overlooks nothing, where the terms are those that are summed out
    )

    def blind(self, posterior: QuadraturePosterior, dim: int) -> str:
        """Why nothing bounds the mass that may have been missed; empty if something does."""
        if self.opaque:
            return f"nothing bounds what {abridged(self.opaque)} may hide between the points looked at"
        if dim > 1 and not self.every_term and not bool(posterior.concave.all()):
            return "log p(x, z) is not concave, and a sum of more terms than can be searched one by one"
        return ""


def _search(log_joint: LogJointOfModel, rows: tuple[int, ...], dtype: torch.dtype) -> _Search:
    """The modes of the terms of the sums that the model computes, from which its own modes are sought."""
    dim = log_joint.layout.dim
    opaque = [str(s) for s in _dependent(log_joint) if s.family in _OPAQUE]
    density = unconstrained(log_joint, log_joint.layout.transform)
    starts = 3.0 * torch.cat([torch.zeros(1, dim), torch.eye(dim), -torch.eye(dim)]).to(
        log_joint.device, dtype
    )
    starts = starts.reshape(-1, *[1] * len(rows), dim).expand(-1, *rows, dim)
    sums = sums_of(density, starts[1:2])
    found = modes_of_terms(density, sums, starts) if sums.sizes else None
    summed = bool(log_joint.layout.summed)
    told = summed and dim == 1 and not opaque and not sums.sizes
    bounds = bounds_of_factors(log_joint, log_joint.layout.transform) if told else None
    return _Search(found, opaque, sums.all_tried and not summed, bounds)


def _probe(joint: Joint, data: Values, values: Values) -> Evaluation:
    with torch.no_grad():
        return joint.evaluate(data, values)


def _solve(
    log_joint: LogJointOfModel,
    rows: tuple[int, ...],
    layout: Layout,
    dtype: torch.dtype,
) -> tuple[Kernel, str, str]:
    """The posterior, which engine it is of and why, and what nothing bounds the error by (else empty)."""
    names = abridged([b.name for b in layout.blocks])
    given = f" given {abridged(layout.discrete)}" if layout.discrete else ""
    why, no_path = "its support is bounded", ""
    if layout.transform is None:
        steps = path_steps(layout)
        if steps is not None:
            try:
                return _as_path(log_joint, rows, steps, dtype)
            except NotQuadratic as error:
                no_path = f", and log p(x, z) is no path ({error.got})"
        if layout.dim <= MAX_DENSE:
            try:
                found = gaussian_posterior(log_joint, rows, layout.dim, dtype=dtype, device=log_joint.device)
                suspects = _not_gaussian(log_joint) if layout.dim <= QUADRATURE_DIMS else []
                if suspects:
                    raise NotQuadratic(
                        "log joint", f"{', '.join(suspects)} may be anything between the points", 0.0
                    )
                return (
                    found,
                    f"Gaussian: log p(x, z) is quadratic in {names}{given} (checked at random points)",
                    _unproven(log_joint),
                )
            except NotQuadratic as error:
                why = f"log p(x, z) is not quadratic in {names} ({error.got})"
            few = path_steps(layout, 2)
            if steps is None and few is not None and not _not_gaussian(log_joint):
                try:  # a stiff one, whose far points are rounded too much
                    return _as_path(log_joint, rows, few, dtype)
                except (NotQuadratic, ImproperPosterior):
                    pass
        else:
            why = f"{layout.dim} dimensions a row are more than the dense Gaussian engine takes ({MAX_DENSE}){no_path}"
    if layout.dim > QUADRATURE_DIMS:
        listing = abridged([f"{b.name} ({b.size})" for b in layout.blocks])
        raise IntractableError(
            "exact posterior",
            f"a log joint quadratic in the continuous sites, or at most {QUADRATURE_DIMS} of their dimensions a row",
            f"{listing}: {layout.dim} dimensions, and {why}",
            "use vem or svi with a guide for a bound",
        )

    def select(index: Tensor) -> LogJointOfModel:
        return _Selected(log_joint, index)  # type: ignore[return-value]

    chosen = select if layout.local else None
    search = _search(log_joint, rows, dtype)
    found = quadrature(  # type: ignore[assignment]
        log_joint,
        rows,
        layout.dim,
        transform=layout.transform,
        starts=search.starts,
        wary=bool(search.opaque) or not search.every_term,
        select=chosen,
        bounds=search.bounds,
        dtype=dtype,
        device=log_joint.device,
    )
    plural = "" if layout.dim == 1 else "s"
    text = f"quadrature over {names} ({layout.dim} dimension{plural} a row){given}: {why}"
    return found, text, search.blind(found, layout.dim)  # type: ignore[arg-type]


class _Selected:
    """The log joint of some flat rows (configuration, datum), each with its own z: [S, M, d] → [S, M]."""

    def __init__(self, whole: LogJointOfModel, index: Tensor) -> None:
        assert whole.plate is not None
        size = whole.layout.plate_sizes[whole.plate]
        self.datum, self.configuration = index % size, torch.div(index, size, rounding_mode="floor")
        self.layout = whole.layout
        self.unique, self.position = torch.unique(self.datum, return_inverse=True)
        self.log_joint = whole.of_rows(self.unique)

    def __call__(self, z: Tensor) -> Tensor:
        count = 1
        for s in self.layout.discrete_sizes:
            count *= s
        full = z.new_zeros(z.shape[0], count, len(self.unique), z.shape[-1])
        # Rows of other configurations stand at the same datum's point: any valid value will do, it is not read back.
        full[:, :, self.position] = z.unsqueeze(1)
        full = full.index_put(
            (torch.arange(len(z), device=z.device).unsqueeze(-1), self.configuration, self.position), z
        )
        shaped = full.reshape(z.shape[0], *self.layout.discrete_sizes, len(self.unique), z.shape[-1])
        table = self.log_joint(shaped).reshape(z.shape[0], count, len(self.unique))
        return table[:, self.configuration, self.position]


def _as_path(
    log_joint: LogJointOfModel, rows: tuple[int, ...], steps: int, dtype: torch.dtype
) -> tuple[Kernel, str, str]:
    """`_solve` by the state-space engine; raises what that raises."""
    layout = log_joint.layout
    names, given = abridged([b.name for b in layout.blocks]), abridged(layout.discrete)
    path = state_space_posterior(
        _flat_path(log_joint, layout.dim),
        rows,
        steps,
        layout.dim // steps,
        dtype=dtype,
        device=log_joint.device,
    )
    quadratic = f"log p(x, z) is quadratic in {names}{f' given {given}' if given else ''}"
    text = f"Gaussian path over {steps} steps: {quadratic}, each step tied to its neighbours"
    if bool((path.log_evidence_error > 0).any()):
        text += "; it is stiff, and what rounding of its precision leaves open is log_evidence_error"
    return Path(path), text, _unproven(log_joint)


def path_steps(layout: Layout, least: int = SHORT_PATH) -> int | None:
    """T, if the continuous sites look like a sequence: many sites of one size, or one site with a long first axis."""
    blocks = layout.blocks
    if len(blocks) >= least and len({b.size for b in blocks}) == 1:
        return len(blocks)
    if (
        len(blocks) == 1
        and blocks[0].event_shape
        and not blocks[0].inner
        and blocks[0].event_shape[0] >= least
    ):
        return blocks[0].event_shape[0]
    return None


def _flat_path(log_joint: LogJointOfModel, dim: int):  # type: ignore[no-untyped-def]
    def flat(z: Tensor) -> Tensor:
        return log_joint(z.reshape(*z.shape[:-2], dim))

    return flat
