"""Which exact engine serves a model with continuous latent sites, tried from the most to the least exact."""

from __future__ import annotations

import torch
from torch import Tensor

from lvmppl.continuous_posteriors import ContinuousPosterior, Kernel, Path
from lvmppl.density import Joint, Values
from lvmppl.errors import IntractableError
from lvmppl.exact.continuous import (
    MAX_DENSE,
    QUADRATURE_DIMS,
    Layout,
    LogJointOfModel,
    constant_part,
    layout_of,
    rows_of,
)
from lvmppl.exact.evaluation import NotQuadratic
from lvmppl.exact.gaussian import gaussian_posterior
from lvmppl.exact.quadrature import quadrature
from lvmppl.exact.state_space import state_space_posterior

SHORT_PATH = 8  # steps from which a sequence of equal sites is tried as a path, in O(T)


def continuous_posterior(joint: Joint, data: Values, values: Values) -> ContinuousPosterior:
    """The exact Gaussian posterior if log p(x, z) is quadratic in z, else quadrature for at most three dimensions a row.

    Raises:
        IntractableError: neither applies; names the sites, their dimensions and what can be used instead.
        ImproperPosterior: the posterior has no finite integral.
    """
    evaluation = _probe(joint, data, values)
    layout = layout_of(joint, evaluation)
    log_joint = LogJointOfModel(joint, data, values, layout)
    rows = layout.rows(joint.structure.data_plate)
    dtype = evaluation.factors[0].log_prob.dtype
    variables = {n: evaluation.variables[n] for n in layout.discrete}
    kernel, engine = _solve(log_joint, rows, layout, joint, data, values, dtype)
    constant = float(constant_part(joint, evaluation, layout))
    return ContinuousPosterior(kernel, layout, variables, joint.structure.data_plate, engine, constant)


def _probe(joint: Joint, data: Values, values: Values):  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return joint.evaluate(data, values)


def _solve(
    log_joint: LogJointOfModel,
    rows: tuple[int, ...],
    layout: Layout,
    joint: Joint,
    data: Values,
    values: Values,
    dtype: torch.dtype,
) -> tuple[Kernel, str]:
    names = _listed([b.name for b in layout.blocks])
    given = f" given {', '.join(layout.discrete)}" if layout.discrete else ""
    why = "its support is bounded"
    if layout.transform is None:
        steps = path_steps(layout)
        if steps is not None:
            try:
                path = state_space_posterior(
                    _flat_path(log_joint, layout.dim), rows, steps, layout.dim // steps, dtype=dtype
                )
                return (
                    Path(path),
                    (
                        f"Gaussian path over {steps} steps: log p(x, z) is quadratic in {names}{given}, "
                        "each step tied to its neighbours"
                    ),
                )
            except NotQuadratic:
                pass
        if layout.dim <= MAX_DENSE:
            try:
                found = gaussian_posterior(log_joint, rows, layout.dim, dtype=dtype)
                return (
                    found,
                    f"Gaussian: log p(x, z) is quadratic in {names}{given} (checked at random points)",
                )
            except NotQuadratic as error:
                why = f"log p(x, z) is not quadratic in {names} ({error.got})"
        else:
            why = f"{layout.dim} dimensions a row are more than the dense Gaussian engine takes ({MAX_DENSE})"
    if layout.dim > QUADRATURE_DIMS:
        listing = _listed([f"{b.name} ({b.size})" for b in layout.blocks])
        raise IntractableError(
            "exact posterior",
            f"a log joint quadratic in the continuous sites, or at most {QUADRATURE_DIMS} of their dimensions a row",
            f"{listing}: {layout.dim} dimensions, and {why}",
            "use vem or svi with a guide for a bound",
        )

    def select(index: Tensor) -> LogJointOfModel:
        return _Selected(joint, data, values, layout, index)  # type: ignore[return-value]

    chosen = select if layout.local else None
    found = quadrature(log_joint, rows, layout.dim, transform=layout.transform, select=chosen, dtype=dtype)  # type: ignore[assignment]
    return found, f"quadrature over {names} ({layout.dim} dimensions a row){given}: {why}"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{names[0]}, …, {names[-1]} ({len(names)} sites)"


class _Selected:
    """The log joint of some flat rows (configuration, datum), each with its own z: [S, M, d] → [S, M]."""

    def __init__(self, joint: Joint, data: Values, values: Values, layout: Layout, index: Tensor) -> None:
        plate = joint.structure.data_plate
        assert plate is not None
        size = layout.plate_sizes[plate]
        self.datum, self.configuration = index % size, torch.div(index, size, rounding_mode="floor")
        self.layout = layout
        self.unique, self.position = torch.unique(self.datum, return_inverse=True)
        self.log_joint = rows_of(joint, data, values, layout, self.unique)

    def __call__(self, z: Tensor) -> Tensor:
        count = 1
        for s in self.layout.discrete_sizes:
            count *= s
        full = z.new_zeros(z.shape[0], count, len(self.unique), z.shape[-1])
        # Rows of other configurations stand at the same datum's point: any valid value will do, it is not read back.
        full[:, :, self.position] = z.unsqueeze(1)
        full = full.index_put((torch.arange(len(z)).unsqueeze(-1), self.configuration, self.position), z)
        shaped = full.reshape(z.shape[0], *self.layout.discrete_sizes, len(self.unique), z.shape[-1])
        table = self.log_joint(shaped).reshape(z.shape[0], count, len(self.unique))
        return table[:, self.configuration, self.position]


def path_steps(layout: Layout) -> int | None:
    """T, if the continuous sites look like a sequence: many sites of one size, or one site with a long first axis."""
    blocks = layout.blocks
    if len(blocks) >= SHORT_PATH and len({b.size for b in blocks}) == 1:
        return len(blocks)
    if (
        len(blocks) == 1
        and blocks[0].event_shape
        and not blocks[0].inner
        and blocks[0].event_shape[0] >= SHORT_PATH
    ):
        return blocks[0].event_shape[0]
    return None


def _flat_path(log_joint: LogJointOfModel, dim: int):  # type: ignore[no-untyped-def]
    def flat(z: Tensor) -> Tensor:
        return log_joint(z.reshape(*z.shape[:-2], dim))

    return flat
