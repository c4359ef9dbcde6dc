"""What is known of a program and of one pass of it: parameters, sites, plates, variables and log-factors.

Shapes: N rows of data, B rows of a batch; enumerated axes stand left of plate axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributions.constraints import Constraint

Values = Mapping[str, Tensor]
"""Constrained parameter values by name."""


def time_axis(steps: int) -> str:
    """The axis of the steps of a latent chain of T steps, in the factors that see it."""
    return f"·time{steps}"


def chain_axes(name: str, steps: int) -> tuple[str, str, str]:
    """Axes of a chain's transition factor: the step (T − 1 of them, if it changes), the state before, the state after."""
    return f"·step{steps}", f"{name}·from", f"{name}·to"


POINTS = "·points"
"""The axis of points at which continuous sites are held."""

PARTICLES = "·particles"
"""The axis of independent draws of the guide."""


@dataclass(frozen=True)
class Rows:
    """Which rows of the data plate are handed in: all of them, or a batch of B given by its indices."""

    total: int
    indices: Tensor | None = None

    @property
    def size(self) -> int:
        return self.total if self.indices is None else len(self.indices)

    @property
    def scale(self) -> float:
        """N / B: the weight that makes a batch an unbiased stand-in for all rows."""
        return self.total / self.size


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as first seen: its constraint, its start (constrained) and, for a per-datum table, its row axis.

    is_site: whether it is a sample site of the model, fitted as a point with its density as prior.
    """

    name: str
    constraint: Constraint
    initial: Tensor
    row_axis: int | None = None  # negative axis of the data plate in the tensor, None for a global parameter
    is_site: bool = False

    @property
    def is_table(self) -> bool:
        return self.row_axis is not None

    def rows_of(self, values: Tensor, rows: Rows) -> Tensor:
        if self.row_axis is None or rows.indices is None:
            return values
        return values.index_select(self.row_axis, rows.indices)


@dataclass(frozen=True)
class Variable:
    """An enumerated discrete site: its support (one entry a state) and the plates it stands in.

    A Markov chain is one variable whose value is a sequence: `steps` is its length T, `lengths` the steps of each
    sequence (axes named by `lengths_dims`), None when all have T.
    """

    name: str
    plates: tuple[str, ...]
    support: Tensor  # [K, *event]; of a chain [K], the states of one step
    steps: int | None = None
    lengths: Tensor | None = None
    lengths_dims: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.support)


@dataclass(frozen=True)
class Factor:
    """One log-factor: `log_prob` with axes named by `dims` (enumerated sites, then plates); axes of size 1 are dropped.

    A plate in `plates` without an axis in `dims` means that the factor is constant along it.
    """

    site: str
    log_prob: Tensor
    dims: tuple[str, ...]
    plates: frozenset[str]
    scale: float | Tensor = 1.0  # a tensor is aligned with `scale_dims`
    scale_dims: tuple[str, ...] = ()
    observed: bool = False


@dataclass(frozen=True)
class SiteView:
    """A sample site as one pass of the model left it: distribution and value, and what its axes are called.

    axis_names: by negative batch axis; an axis of size 1 has no name. steps: of the chains that it may depend on.
    `factors()` computes the log-density (of a chain: of its start and steps).
    """

    name: str
    fn: Any
    value: Tensor
    observed: bool
    mask: Any
    scale: float | Tensor
    scale_dims: tuple[str, ...]
    axis_names: Mapping[int, str]
    plates: frozenset[str]
    factors: Callable[[], list[Factor]]
    steps: frozenset[int] = frozenset()
    given: Any = (
        None  # an observed value as it was handed in, in which `visible` says what counts (None: all)
    )
    visible: Tensor | None = None


@dataclass(frozen=True)
class SiteInfo:
    """A sample site as the first trace showed it."""

    name: str
    kind: str  # "observed", "enumerated", "latent", or "parameter": a latent site that is fitted as part of θ
    plates: tuple[str, ...]
    family: str
    event_shape: tuple[int, ...]
    discrete: bool
    reparameterised: bool
    auxiliary: bool = False  # a guide's own variable, which the model knows nothing of
    support: Any = None
    finite: bool = False  # its states can be listed
    circular: bool = False  # of angles: its integral is 1 over one turn, though torch calls its support ℝ


@dataclass(frozen=True)
class Structure:
    """What one trace taught of a program: parameters, sites, plates and where the data plate stands.

    mixed: operations of a model that may have put the values of enumerated sites together over their states.
    """

    parameters: Mapping[str, ParameterSpec]
    sites: Mapping[str, SiteInfo]
    plates: Mapping[str, int]  # size by name
    plate_axes: Mapping[str, int]
    nesting: int
    data_plate: str | None
    num_rows: int
    mixed: tuple[str, ...] = ()

    @property
    def latents(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.sites.values() if s.kind in ("enumerated", "latent"))

    @property
    def enumerated(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.sites.values() if s.kind == "enumerated")

    @property
    def continuous(self) -> tuple[str, ...]:
        """Latent sites that are not enumerated."""
        return tuple(s.name for s in self.sites.values() if s.kind == "latent")

    @property
    def shared(self) -> list[str]:
        """Continuous latents that the data share."""
        return shared_continuous(self.sites, self.data_plate)


def shared_continuous(sites: Mapping[str, SiteInfo], plate: str | None) -> list[str]:
    """Global continuous latents: outside of the data plate of a model that has one."""
    if plate is None:
        return []
    return [n for n, s in sites.items() if s.kind == "latent" and not s.discrete and plate not in s.plates]


@dataclass(frozen=True)
class Drawing:
    """How one pass of a guide draws the sites that are not summed.

    particles: J independent draws along an axis of their own, `PARTICLES`. scores: sites whose value carries no
    gradient; finite ones among them are drawn instead of summed. temperatures: of the relaxed sites (which are finite),
    `hard` those whose value is a state with the gradient of the relaxed one. held: values of drawn sites that are given.
    analytic: sites of which KL[q ‖ prior] stands for log q and log prior at the draw.
    """

    particles: int = 1
    scores: frozenset[str] = frozenset()
    temperatures: Mapping[str, float] = field(default_factory=dict)
    hard: frozenset[str] = frozenset()
    held: Values = field(default_factory=dict)
    analytic: frozenset[str] = frozenset()

    def sums(self, site: str) -> bool:
        """Whether a finite site is summed."""
        return site not in self.scores and site not in self.temperatures


@dataclass(frozen=True)
class Evaluation:
    """The log-factors of one pass of the model (and of the guide) at given θ, λ and rows.

    Drawn several times at once, factors that depend on the draw have an axis `PARTICLES`, whose size is among
    `plate_sizes`.
    """

    factors: tuple[Factor, ...]
    guide_factors: tuple[Factor, ...]
    variables: Mapping[str, Variable]
    guide_variables: frozenset[str]  # enumerated by the guide; the model's others are summed exactly
    plate_sizes: Mapping[str, int]
    samples: Mapping[str, Tensor] = field(default_factory=dict)  # drawn values of the guide's sites
    score_factors: tuple[Factor, ...] = ()  # log q of drawn sites whose value carries no gradient
    sample_axes: Mapping[str, Mapping[int, str]] = field(
        default_factory=dict
    )  # of each value drawn or integrated: what its batch axes are called, by negative axis
    moments: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # [2, *batch, *event], E z and E z² of the guide's continuous sites that were integrated, not drawn
