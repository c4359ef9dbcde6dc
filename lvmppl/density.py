"""A Pyro model (and guide) as factor functions: the one place that speaks to Pyro's effect handlers.

A model p(x, z; θ) is traced once to learn its structure (`discover`); after that `evaluate` maps (θ, rows) to
log-factors f_s with named axes: the name of each enumerated site and of each plate an axis belongs to. The exact
engine, EM, gradient ascent and the ELBO all work on these factors and never see a Pyro trace.

θ and λ are plain dictionaries of constrained tensors that are handed in; Pyro's parameter store is not used. Inside
the data plate a `pyro.param(name, init, event_dim=e)` is a table with a row per datum, of which the batch's rows are
returned (DESIGN: rows are handed in, indices never are).

Shapes: N rows of data, B rows of a batch; enumerated axes stand left of plate axes.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint

from lvmppl.bilinear import log_density
from lvmppl.distributions import MarkovChain
from lvmppl.errors import InputError, ModelError

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

_SPARE_NESTING = 12  # plate axes reserved in the first trace, before the real nesting is known


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
    """A parameter as first seen: its constraint, its start (constrained) and, for a per-datum table, its row axis."""

    name: str
    constraint: Constraint
    initial: Tensor
    row_axis: int | None = None  # negative axis of the data plate in the tensor, None for a global parameter

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


@dataclass(frozen=True)
class SiteInfo:
    """A sample site as the first trace showed it."""

    name: str
    kind: str  # "observed", "enumerated", "latent"
    plates: tuple[str, ...]
    family: str
    event_shape: tuple[int, ...]
    discrete: bool
    reparameterised: bool
    auxiliary: bool = False  # a guide's own variable, which the model knows nothing of
    support: Any = None


@dataclass(frozen=True)
class Structure:
    """What one trace taught of a program: parameters, sites, plates and where the data plate stands."""

    parameters: Mapping[str, ParameterSpec]
    sites: Mapping[str, SiteInfo]
    plates: Mapping[str, int]  # size by name
    plate_axes: Mapping[str, int]
    nesting: int
    data_plate: str | None
    num_rows: int

    @property
    def latents(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.sites.values() if s.kind != "observed")

    @property
    def enumerated(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.sites.values() if s.kind == "enumerated")


@dataclass(frozen=True)
class Evaluation:
    """The log-factors of one pass of the model (and of the guide) at given θ, λ and rows."""

    factors: tuple[Factor, ...]
    guide_factors: tuple[Factor, ...]
    variables: Mapping[str, Variable]
    guide_variables: frozenset[str]  # enumerated by the guide; the model's others are summed exactly
    plate_sizes: Mapping[str, int]
    samples: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # drawn values of the guide's continuous sites
    score_factors: tuple[Factor, ...] = ()  # log q of drawn sites that have no reparameterised gradient


# ---------------------------------------------------------------------------------------------------- programs


class Program:
    """A model or guide as a callable of the data tensors, its module's weights (if any) handed in by name.

    `function` is called with the data as keywords. A `torch.nn.Module` contributes `<prefix>.<dotted name>` for each
    of its own parameters, and keeps its own tensors untouched.
    """

    def __init__(self, function: Callable[..., Any], role: str) -> None:
        self.function = function
        self.role = role
        self.module = function if isinstance(function, nn.Module) else None
        for part in self.module.modules() if self.module is not None else ():
            _keep_own_parameters(part)

    def weights(self) -> dict[str, nn.Parameter]:
        """The module's own nn.Parameters (PyroParams excepted: those come as parameter statements)."""
        if self.module is None:
            return {}
        return {
            f"{self.role}.{name}": p
            for name, p in self.module.named_parameters()
            if p.requires_grad and not name.endswith("_unconstrained")
        }

    def __call__(self, data: Values, values: Values) -> None:
        try:
            if self.module is None:
                self.function(**data)
            else:
                swapped = {name: values[f"{self.role}.{name}"] for name in self._weight_names(values)}
                torch.func.functional_call(self.module, swapped, args=(), kwargs=dict(data))
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            raise _as_model_error(self.role, self.function, error) from error

    def _weight_names(self, values: Values) -> Iterator[str]:
        prefix = f"{self.role}."
        assert self.module is not None
        own = dict(self.module.named_parameters())
        return (
            name[len(prefix) :] for name in values if name.startswith(prefix) and name[len(prefix) :] in own
        )


def _keep_own_parameters(module: nn.Module) -> None:
    """A PyroModule that was built with Pyro's global parameter store in mind announces its parameters without it."""
    context = getattr(module, "_pyro_context", None)
    if context is not None and not hasattr(context, "param_state"):
        context.param_state = {"params": {}, "constraints": {}}


def _as_model_error(role: str, function: Callable[..., Any], error: Exception) -> ModelError:
    """The user's own error with its file and line: the last frame outside Pyro, torch and this package's engine."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (
        "/lvmppl/density.py",
        "/site-packages/pyro/",
        "/site-packages/torch/",
        "/contextlib.py",
        "/lvmppl/families.py",
    )
    outside = [f for f in frames if not any(part in f.filename for part in ours)]
    place = f"{outside[-1].filename}:{outside[-1].lineno}" if outside else "its own code"
    name = getattr(function, "__name__", type(function).__name__)
    detail = " ".join(str(error).split())
    return ModelError(
        f"{role} '{name}' at {place}",
        f"a {role} that runs on these data",
        f"{type(error).__name__}: {detail[:600]}",
        f"mend the {role} there (`lvmppl check` runs it once without fitting)",
    )


class _Parameters(Messenger):
    """Answers every parameter statement from `values`; unknown names are recorded with their own start."""

    def __init__(
        self, values: Values, specs: Mapping[str, ParameterSpec], rows: Rows, data_plate: str | None
    ) -> None:
        super().__init__()
        self.values, self.specs, self.rows, self.data_plate = values, specs, rows, data_plate

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            spec = self.specs[name]
            value = self.values[name]
            axis = spec.row_axis
            if axis is not None and self.rows.indices is not None and value.shape[axis] != self.rows.size:
                value = spec.rows_of(value, self.rows)
            msg["value"] = value
            msg["done"] = True


class _Discovery(Messenger):
    """Records parameters at their first statement, with the plates they stand in, and answers with their start."""

    def __init__(self, weights: Values) -> None:
        super().__init__()
        self.own = {
            id(w) for w in weights.values()
        }  # a module's weights are announced too; they are known already
        self.found: dict[str, tuple[Constraint, int | None, Tensor, tuple[Any, ...]]] = {}

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.found:
            msg["value"], msg["done"] = self.found[name][2], True
            return
        if len(msg["args"]) > 1 and id(msg["args"][1]) in self.own:
            return
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if len(msg["args"]) > 1:
            start = msg["args"][1]
            start = start() if callable(start) and not isinstance(start, Tensor) else start
        else:
            start = msg["fn"](*msg["args"], **msg["kwargs"])
        if not isinstance(start, Tensor):
            raise TypeError(f"pyro.param('{name}') starts from a {type(start).__name__}, not a tensor")
        start = start.detach().clone()
        _check_start(name, constraint, start)
        event_dim = msg["kwargs"].get("event_dim")
        # A PyroParam is stated wherever it is looked up; without an event_dim it is no table of the plates around.
        frames = () if len(msg["args"]) == 1 and event_dim is None else tuple(msg["cond_indep_stack"])
        self.found[name] = (constraint, event_dim, start, frames)
        msg["value"], msg["done"] = start, True


def _check_start(name: str, constraint: Constraint, start: Tensor) -> None:
    if start.is_floating_point() and not bool(torch.isfinite(start).all()):
        raise ValueError(f"pyro.param('{name}') starts from values that are not finite")
    if not bool(constraint.check(start).all()):
        raise ValueError(f"pyro.param('{name}') starts outside its constraint {constraint}")


class _Enumerate(Messenger):
    """Marks the guide's finite discrete sites for exact enumeration unless the user said otherwise."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("enumerate") is not None:
            return
        if getattr(msg["fn"], "has_enumerate_support", False) and not msg["infer"].get("is_auxiliary"):
            msg["infer"]["enumerate"] = "parallel"


class _Hold(Messenger):
    """Holds latent sites at given values."""

    def __init__(self, points: Values) -> None:
        super().__init__()
        self.points = points

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.points:
            msg["value"], msg["done"] = self.points[msg["name"]], True


class EnumeratedChain(dist.TorchDistribution):
    """Stands in for a MarkovChain while sites are enumerated: the states of one step, so that z has K values, not Kᵀ.

    What depends on z step by step (`table[z]`, its steps kept apart by `.to_event`) then has an axis of states and one of
    steps, and forward-backward sums over the sequences.
    """

    arg_constraints: dict[str, Constraint] = {}  # noqa: RUF012 - torch's own protocol
    has_enumerate_support = True

    def __init__(self, chain: MarkovChain) -> None:
        self.chain = chain
        super().__init__(chain.batch_shape, chain.event_shape, validate_args=False)

    @property
    def support(self) -> Constraint:
        return self.chain.support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        states = torch.arange(self.chain.states, device=self.chain.log_initial.device)
        return states.reshape(-1, *[1] * len(self.batch_shape), 1)


class _Chains(Messenger):
    """Gives every enumerated MarkovChain site the states of one step as its value, at an enumeration axis of its own."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if (
            isinstance(fn, MarkovChain)
            and not msg["is_observed"]
            and msg["infer"].get("enumerate") == "parallel"
        ):
            msg["fn"] = EnumeratedChain(fn)


@contextmanager
def _swapped_modules(values: Values) -> Iterator[None]:
    """Within the block `pyro.module(name, net)` computes with the tensors in `values`; `net` gets its own back after.

    Pyro ties such parameters to the module by identity in its global store, which this library never uses.
    """
    original = pyro.module
    undo: list[tuple[nn.Module, str, Any]] = []

    def module(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
        result: nn.Module = original(name, nn_module)
        for dotted, _ in list(nn_module.named_parameters()):
            full = f"{name}$$${dotted}"
            if full in values:
                owner_path, _, leaf = dotted.rpartition(".")
                owner = nn_module.get_submodule(owner_path)
                undo.append((owner, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = values[full]  # type: ignore[assignment]
        return result

    pyro.module = module
    try:
        yield
    finally:
        pyro.module = original
        for owner, leaf, saved in reversed(undo):
            owner._parameters[leaf] = saved


@contextmanager
def isolated(seed: int | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    """A call of its own: parameter store, random state, default dtype and settings are as before when it ends."""
    previous = torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        pyro.get_param_store().scope(),
        pyro.settings.context(module_local_params=True),
    ):
        try:
            if dtype is not None:
                torch.set_default_dtype(dtype)
            if seed is not None:
                torch.manual_seed(seed)
            yield
        finally:
            torch.set_default_dtype(previous)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Arguments were validated in the first trace; the steps of a fit skip the checks."""
    with pyro.validation_enabled(False):
        yield


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, fit, restart, step): FNV-1a over the parts, then `mixed`."""
    state = 0xCBF29CE484222325
    for byte in "\x1f".join(str(p) for p in parts).encode():
        state = ((state ^ byte) * 0x100000001B3) & _MASK
    return mixed(state)


_MASK = 0xFFFFFFFFFFFFFFFF


def mixed(state: int) -> int:
    """One output of splitmix64 (Steele, Lea & Flood 2014), 63 bits: neighbouring states give unrelated seeds."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


# --------------------------------------------------------------------------------------------------- discovery


def num_rows(data: Values) -> int:
    """N, the size of the first axis that all data tensors share."""
    sizes = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in data.items()}
    distinct = set(sizes.values())
    if len(distinct) != 1 or None in distinct:
        listing = (
            ", ".join(f"{k}: {'a scalar' if v is None else v}" for k, v in sizes.items()) or "no tensors"
        )
        raise InputError(
            "data", "tensors that share their first axis", listing, "give every tensor a row per datum"
        )
    size = distinct.pop()
    assert size is not None
    if size == 0:
        raise InputError("data", "at least one row", "0 rows")
    return size


def discover(
    program: Program, data: Values, data_plate: str | None = None, model: Structure | None = None
) -> Structure:
    """Run `program` once on all rows and learn its parameters, sites and plates.

    Enumerated sites are enumerated already here, so that `loc[z]` never takes the size of the data. For a guide,
    `model` is the model's structure: the data plate's name is taken from it.
    """
    total = num_rows(data)
    if program.module is not None:
        # modules may build themselves at the first call, as autoguides do
        with poutine.block(), torch.no_grad(), pyro.get_param_store().scope():
            program(data, {})
    weights = {name: w.detach() for name, w in program.weights().items()}
    found = _Discovery(weights)
    enumeration = poutine.enum(first_available_dim=-1 - _SPARE_NESTING)
    finite = _Enumerate() if program.role == "guide" else nullcontext()
    with found, poutine.trace() as tracer, enumeration, _Chains(), finite:
        program(data, weights)
    sites, sizes, axes = _read_sites(tracer.trace)
    plate = (
        model.data_plate if model is not None else _find_data_plate(tracer.trace, total, data_plate, sizes)
    )
    if plate is not None and plate in sizes and sizes[plate] != total:
        raise ModelError(
            f"{program.role}: plate '{plate}'",
            f"the size of the data, {total}",
            f"{sizes[plate]}",
            f"write pyro.plate('{plate}', len(x)) so that the plate has the size of the rows it is handed",
        )
    nesting = max((-axis for axis in axes.values()), default=0)
    if model is not None:
        nesting = max(nesting, model.nesting)
    parameters = {name: ParameterSpec(name, constraints.real, w.clone()) for name, w in weights.items()}
    for name, (constraint, event_dim, start, frames) in found.found.items():
        parameters.setdefault(name, _parameter_spec(name, constraint, event_dim, start, frames, plate, total))
    return Structure(parameters, sites, sizes, axes, nesting, plate, total)


def describe(model: Callable[..., Any], data: Values) -> Structure:
    """The structure of a model for a guide that is built from it, hidden from the handlers around this call."""
    with poutine.block(), torch.no_grad():
        return discover(Program(model, "model"), data)


def _parameter_spec(
    name: str,
    constraint: Constraint,
    event_dim: int | None,
    start: Tensor,
    frames: Sequence[Any],
    plate: str | None,
    total: int,
) -> ParameterSpec:
    frame = next((f for f in frames if f.name == plate and f.vectorized), None)
    if frame is None:
        return ParameterSpec(name, constraint, start)
    if event_dim is None:
        raise ModelError(
            f"pyro.param('{name}') inside plate '{plate}'",
            "event_dim, the number of right-most axes that belong to one datum",
            "none",
            f"write pyro.param('{name}', init, event_dim=…), or move a shared parameter out of the plate",
        )
    axis = frame.dim - event_dim
    if start.dim() < -axis or start.shape[axis] == 1 != total:
        return ParameterSpec(name, constraint, start)
    return ParameterSpec(name, constraint, start, row_axis=axis)


def _is_sample(site: Any) -> bool:
    return bool(
        site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic", False)
    )


def _read_sites(trace: Any) -> tuple[dict[str, SiteInfo], dict[str, int], dict[str, int]]:
    sites: dict[str, SiteInfo] = {}
    sizes: dict[str, int] = {}
    axes: dict[str, int] = {}
    for name, site in trace.nodes.items():
        if not _is_sample(site):
            continue
        frames = [f for f in site["cond_indep_stack"] if f.vectorized]
        for frame in frames:
            sizes[frame.name] = frame.size
            axes[frame.name] = frame.dim
        kind = (
            "observed"
            if site["is_observed"]
            else "enumerated"
            if "_enumerate_dim" in site["infer"]
            else "latent"
        )
        fn = site["fn"]
        sites[name] = SiteInfo(
            name,
            kind,
            tuple(f.name for f in frames),
            _family_name(fn),
            tuple(fn.event_shape),
            bool(getattr(fn.support, "is_discrete", False)),
            bool(fn.has_rsample),
            bool(site["infer"].get("is_auxiliary")),
            fn.support,
        )
    return sites, sizes, axes


def _family_name(fn: Any) -> str:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return "MarkovChain" if isinstance(fn, EnumeratedChain) else type(fn).__name__


def _find_data_plate(trace: Any, total: int, wanted: str | None, sizes: Mapping[str, int]) -> str | None:
    if wanted is not None:
        if wanted not in sizes:
            raise ModelError(
                "data_plate", f"one of the model's plates ({', '.join(sizes) or 'it has none'})", wanted
            )
        return wanted
    if "data" in sizes:
        return "data"
    outer: dict[str, bool] = {}
    for site in trace.nodes.values():
        if _is_sample(site):
            for depth, frame in enumerate(f for f in site["cond_indep_stack"] if f.vectorized):
                outer[frame.name] = outer.get(frame.name, True) and depth == 0
    candidates = [name for name, is_outer in outer.items() if is_outer and sizes[name] == total]
    if len(candidates) > 1:
        raise ModelError(
            "the model's data plate",
            f"one outermost plate of the data's size {total}",
            ", ".join(sorted(candidates)),
            "name it 'data', or say `data_plate: NAME`",
        )
    return candidates[0] if candidates else None


# -------------------------------------------------------------------------------------------------- evaluation


class Joint:
    """A model, and perhaps a guide, bound to their structures: (θ, λ, rows) → factors."""

    def __init__(
        self,
        model: Program,
        structure: Structure,
        guide: Program | None = None,
        guide_structure: Structure | None = None,
    ) -> None:
        self.model, self.structure = model, structure
        self.guide, self.guide_structure = guide, guide_structure
        nesting = max(structure.nesting, guide_structure.nesting if guide_structure else 0)
        self.first_available_dim = -1 - nesting
        self.specs: dict[str, ParameterSpec] = dict(structure.parameters)
        if guide_structure is not None:
            self.specs.update(guide_structure.parameters)

    @contextmanager
    def _enumeration(self) -> Iterator[None]:
        with poutine.enum(first_available_dim=self.first_available_dim), _Chains():
            yield

    def evaluate(self, data: Values, values: Values, rows: Rows | None = None) -> Evaluation:
        """The log-factors at `values` on the rows handed in; the guide (if any) runs first and the model replays it."""
        rows = rows or Rows(num_rows(data))
        parameters = _Parameters(values, self.specs, rows, self.structure.data_plate)
        names: dict[int, str] = {}
        with parameters, _swapped_modules(values):
            if self.guide is None:
                with poutine.trace() as model_trace, self._enumeration():
                    self.model(data, values)
                return _build(model_trace.trace, None, rows, self.structure, names)
            with poutine.trace() as guide_trace, self._enumeration(), _Enumerate():
                self.guide(data, values)
            replay = poutine.replay(trace=guide_trace.trace)
            with poutine.trace() as model_trace, poutine.enum(), _Chains(), replay:
                self.model(data, values)
        return _build(model_trace.trace, guide_trace.trace, rows, self.structure, names)

    def evaluate_at(
        self,
        data: Values,
        values: Values,
        points: Values,
        rows: Rows | None = None,
        configurations: Mapping[int, str] | None = None,
    ) -> Evaluation:
        """The model's log-factors with its continuous sites held at given points, the enumerated ones enumerated.

        points: by site, [S, *batch, *event], where batch has all `nesting` plate axes (size 1 where it has none). Factors
        that depend on the points have a leading axis named `POINTS`. Points that differ between states of enumerated
        sites have axes left of S, named by `configurations` (batch axis → site).
        """
        rows = rows or Rows(num_rows(data))
        parameters = _Parameters(values, self.specs, rows, self.structure.data_plate)
        names: dict[int, str] = {}
        enumeration = poutine.enum(first_available_dim=self.first_available_dim - 1)
        hold = _Hold(points)
        with parameters, _swapped_modules(values), poutine.trace() as trace, enumeration, _Chains(), hold:
            self.model(data, values)
        extra = {self.first_available_dim: POINTS, **(configurations or {})}
        return _build(trace.trace, None, rows, self.structure, names, extra)

    def view(
        self, data: Values, values: Values, rows: Rows | None = None
    ) -> tuple[dict[str, SiteView], Evaluation]:
        """The model's sites before any log-density is computed; the evaluation holds variables and sizes, no factors."""
        rows = rows or Rows(num_rows(data))
        parameters = _Parameters(values, self.specs, rows, self.structure.data_plate)
        with parameters, _swapped_modules(values), poutine.trace() as tracer, self._enumeration():
            self.model(data, values)
        return _views(tracer.trace, rows, self.structure)

    def evaluate_guide(self, data: Values, values: Values, rows: Rows | None = None) -> Evaluation:
        """The guide's log-factors alone; the model is not run."""
        assert self.guide is not None
        rows = rows or Rows(num_rows(data))
        parameters = _Parameters(values, self.specs, rows, self.structure.data_plate)
        finite = _Enumerate()
        with parameters, _swapped_modules(values), poutine.trace() as trace, self._enumeration(), finite:
            self.guide(data, values)
        return _build(None, trace.trace, rows, self.structure, {})


def _build(
    model_trace: Any | None,
    guide_trace: Any | None,
    rows: Rows,
    structure: Structure,
    names: dict[int, str],
    extra_axes: Mapping[int, str] | None = None,
) -> Evaluation:
    extra = extra_axes or {}
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    guide_factors: list[Factor] = []
    score_factors: list[Factor] = []
    samples: dict[str, Tensor] = {}
    guide_variables: set[str] = set()
    plate = structure.data_plate
    if guide_trace is not None:
        for name, site in guide_trace.nodes.items():
            if not _is_sample(site) or site["is_observed"]:
                continue
            _register(name, site, variables, sizes, names)
            if name in variables:
                guide_variables.add(name)
        for name, site in guide_trace.nodes.items():
            if not _is_sample(site) or site["is_observed"]:
                continue
            own = _factors(name, site, rows, plate, names, extra, variables)
            guide_factors.extend(own)
            if name not in variables:
                samples[name] = site["value"]
                if not site["fn"].has_rsample and not _is_delta(site["fn"]):
                    score_factors.extend(own)
    model_sites = {} if model_trace is None else {n: s for n, s in model_trace.nodes.items() if _is_sample(s)}
    for name, site in model_sites.items():
        _register(name, site, variables, sizes, names)
    factors = tuple(
        f for n, s in model_sites.items() for f in _factors(n, s, rows, plate, names, extra, variables)
    )
    if plate is not None:
        sizes.setdefault(plate, rows.size)
    return Evaluation(
        factors,
        tuple(guide_factors),
        variables,
        frozenset(guide_variables),
        sizes,
        samples,
        tuple(score_factors),
    )


def _is_delta(fn: Any) -> bool:
    return _family_name(fn) == "Delta"


def _register(
    name: str, site: Any, variables: dict[str, Variable], sizes: dict[str, int], names: dict[int, str]
) -> None:
    frames = [f for f in site["cond_indep_stack"] if f.vectorized]
    for frame in frames:
        sizes[frame.name] = frame.size
    axis = site["infer"].get("_enumerate_dim")
    if axis is None or name in variables or site["is_observed"]:
        return
    names[site["infer"]["_dim_to_id"][axis]] = name
    plates = tuple(f.name for f in frames)
    if isinstance(site["fn"], EnumeratedChain):
        chain = site["fn"].chain
        sizes[time_axis(chain.num_steps)] = chain.num_steps
        lengths: Tensor | None = None
        dims: tuple[str, ...] = ()
        if chain.lengths is not None:
            lengths, dims = _name_axes(chain.lengths, _axis_names(site, names), name)
        states = torch.arange(chain.states, device=chain.log_initial.device)
        variables[name] = Variable(name, plates, states, chain.num_steps, lengths, dims)
        return
    value, event_dim = site["value"], site["fn"].event_dim
    position = value.dim() + axis - event_dim
    support = value if position < 0 else value.movedim(position, 0)
    support = support.reshape(
        support.shape[0] if position >= 0 else 1, -1, *value.shape[value.dim() - event_dim :]
    )[:, 0]
    variables[name] = Variable(name, plates, support.detach())


def _axis_names(
    site: Any, names: Mapping[int, str], extra: Mapping[int, str] | None = None
) -> dict[int, str]:
    """What each batch axis of a site stands for: a plate, an enumerated site, or what `extra` says."""
    result = {**(extra or {}), **{f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized}}
    result.update({axis: names[i] for axis, i in site["infer"].get("_dim_to_id", {}).items() if i in names})
    return result


def _factors(
    name: str,
    site: Any,
    rows: Rows,
    plate: str | None,
    names: Mapping[int, str],
    extra: Mapping[int, str],
    variables: Mapping[str, Variable],
) -> list[Factor]:
    """The log-factors of one site: one, or the initial and the transition factor of a chain."""
    plates = frozenset(f.name for f in site["cond_indep_stack"] if f.vectorized)
    axis_names = _axis_names(site, names, extra)
    scale: float | Tensor = site["scale"]
    scale_dims: tuple[str, ...] = ()
    if isinstance(scale, Tensor):
        scale, scale_dims = _name_axes(scale, axis_names, name)
    if plate in plates:
        scale = scale * rows.scale
    observed = bool(site["is_observed"])

    def factor(key: str, tensor: Tensor, dims: tuple[str, ...]) -> Factor:
        return Factor(key, tensor, dims, plates, scale, scale_dims, observed)

    if isinstance(site["fn"], EnumeratedChain):
        return [factor(*part) for part in _chain_factors(name, site["fn"].chain, axis_names)]
    steps = _chain_steps(variables, axis_names)
    stepwise = _by_step(site["fn"], site["value"]) if steps and observed else None
    if stepwise is not None and stepwise.shape[-1] in steps:
        tensor, dims = _name_axes(
            _masked(stepwise, site, trailing=1), axis_names, name, (time_axis(stepwise.shape[-1]),)
        )
        if any(variables[d].steps for d in dims if d in variables):
            return [factor(name, tensor, dims)]
    log_prob = log_density(site["fn"], site["value"])
    if observed or "_enumerate_dim" not in site["infer"]:
        log_prob = _masked(log_prob, site)
    return [factor(name, *_name_axes(log_prob, axis_names, name))]


def _chain_steps(variables: Mapping[str, Variable], axis_names: Mapping[int, str]) -> frozenset[int]:
    """Numbers of steps of the chains among the axes of a site."""
    chains = (v for v in variables.values() if v.name in axis_names.values())
    return frozenset(v.steps for v in chains if v.steps is not None)


def _masked(log_prob: Tensor, site: Any, trailing: int = 0) -> Tensor:
    """poutine.mask acts on observed and drawn factors; an enumerated latent keeps its prior."""
    if site["mask"] is None:
        return log_prob
    mask = torch.as_tensor(site["mask"])
    mask = mask.reshape(*mask.shape, *[1] * trailing) if mask.dim() else mask
    return torch.where(mask, log_prob, torch.zeros((), dtype=log_prob.dtype, device=log_prob.device))


def _by_step(fn: Any, value: Tensor) -> Tensor | None:
    """log p(value) with the first event axis left unsummed [*batch, T]; None for a family that ties its event together."""
    if isinstance(fn, dist.MaskedDistribution):
        base = _by_step(fn.base_dist, value)
        if base is None:
            return None
        mask = torch.as_tensor(fn._mask)
        mask = mask.unsqueeze(-1) if mask.dim() else mask
        return torch.where(mask, base, torch.zeros((), dtype=base.dtype, device=base.device))
    if not isinstance(fn, torch.distributions.Independent) or fn.reinterpreted_batch_ndims < 1:
        return None
    base = log_density(fn.base_dist, value)
    events = fn.reinterpreted_batch_ndims
    shape = torch.broadcast_shapes(
        base.shape, fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - events :]
    )
    base = base.expand(shape)
    return base.sum(tuple(range(1 - events, 0))) if events > 1 else base


def _chain_factors(
    name: str, chain: Any, axis_names: Mapping[int, str]
) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
    """(key, tensor, dims) of log p(z₁) and of log p(z_{t+1} | z_t)."""
    yield (name, *_name_axes(chain.log_initial, axis_names, name, (name,)))
    step, before, after = chain_axes(name, chain.num_steps)
    yield (f"{name}·transition", *_name_axes(chain.log_transition, axis_names, name, (step, before, after)))


def _views(trace: Any, rows: Rows, structure: Structure) -> tuple[dict[str, SiteView], Evaluation]:
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    names: dict[int, str] = {}
    plate = structure.data_plate
    nodes = {n: s for n, s in trace.nodes.items() if _is_sample(s)}
    for name, site in nodes.items():
        _register(name, site, variables, sizes, names)
    if plate is not None:
        sizes.setdefault(plate, rows.size)
    views = {}
    for name, site in nodes.items():
        axis_names = _axis_names(site, names)
        plates = frozenset(f.name for f in site["cond_indep_stack"] if f.vectorized)
        scale: float | Tensor = site["scale"]
        scale_dims: tuple[str, ...] = ()
        if isinstance(scale, Tensor):
            scale, scale_dims = _name_axes(scale, axis_names, name)
        if plate in plates:
            scale = scale * rows.scale
        observed = bool(site["is_observed"])
        mask = None if "_enumerate_dim" in site["infer"] and not observed else site["mask"]
        compute = functools.partial(_factors, name, site, rows, plate, names, {}, variables)
        views[name] = SiteView(
            name, site["fn"], site["value"], observed, mask, scale, scale_dims, axis_names, plates, compute,
            _chain_steps(variables, axis_names),
        )  # fmt: skip
    return views, Evaluation((), (), variables, frozenset(), sizes)


def _name_axes(
    tensor: Tensor, axis_names: Mapping[int, str], site: str, trailing: tuple[str, ...] = ()
) -> tuple[Tensor, tuple[str, ...]]:
    """Drop axes of size 1 and name the others; an axis that nothing declares is the user's mistake.

    trailing: names of the right-most axes, which are not batch axes.
    """
    count = len(trailing)
    axis_names = {
        **{a - count: n for a, n in axis_names.items()},
        **{i - count: n for i, n in enumerate(trailing)},
    }
    shape = tensor.shape
    keep = [axis for axis in range(-len(shape), 0) if shape[axis] != 1]
    for axis in keep:
        if axis not in axis_names:
            raise ModelError(
                f"site '{site}'",
                "batch axes that belong to plates",
                f"a batch axis of size {shape[axis]} at dim {axis + count} "
                f"(batch shape {tuple(shape[: len(shape) - count])}) that no plate declares",
                "declare it with pyro.plate, or make it part of the event with .to_event(1)",
            )
    return tensor.reshape([shape[axis] for axis in keep]), tuple(axis_names[axis] for axis in keep)


# ------------------------------------------------------------------------------------------- parameter coordinates


class Coordinates:
    """Between constrained values and the unconstrained ones that gradient steps move."""

    def __init__(self, specs: Mapping[str, ParameterSpec], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.transforms = {name: transform_to(specs[name].constraint) for name in self.names}

    def unconstrain(self, values: Values) -> dict[str, Tensor]:
        return {name: self.transforms[name].inv(values[name]).detach().clone() for name in self.names}

    def constrain(self, unconstrained: Values) -> dict[str, Tensor]:
        return {name: self.transforms[name](unconstrained[name]) for name in self.names}


def build_guide(
    factory: Callable[..., Any], model: Callable[..., Any], structure: Structure, **args: Any
) -> Callable[..., Any]:
    """Build a guide that takes a parameter `model` (Pyro's autoguide convention).

    Autoguides are blind to enumerated sites, which are summed exactly, and get `create_plates` so that the data plate
    takes the size of the rows handed in.
    """
    build: Any = factory
    if isinstance(factory, type) and issubclass(factory, AutoGuide):
        if not any(s.kind == "latent" for s in structure.sites.values()):
            raise ModelError(
                f"guide {factory.__name__}",
                "a model with continuous latent sites",
                f"only enumerated ones ({', '.join(structure.enumerated)})",
                "use a guide over them, such as `categorical`",
            )
        blind: Any = factory
        autoguide: Any = blind(_prototype(model, structure), **args)
        if getattr(autoguide, "create_plates", None) is None:  # not every one takes it in its constructor
            autoguide.create_plates = _data_plates(structure)
        result: Callable[..., Any] = autoguide
        return result
    guide: Callable[..., Any] = build(model, **args)
    take = getattr(guide, "use_structure", None)
    if take is not None:
        take(structure)
    return guide


def _prototype(model: Callable[..., Any], structure: Structure) -> Callable[..., Any]:
    """The model as an autoguide looks at it: without enumerated sites, its parameters at their start.

    An autoguide is a module with parameters of its own, and refuses those that the model states inside it.
    """
    start = {name: spec.initial for name, spec in structure.parameters.items()}

    def prototype(**data: Tensor) -> None:
        with _Parameters(start, structure.parameters, Rows(structure.num_rows), structure.data_plate):
            poutine.block(model, hide=list(structure.enumerated))(**data)

    return prototype


def _data_plates(structure: Structure) -> Callable[..., list[Any]]:
    plate = structure.data_plate

    def create_plates(**data: Tensor) -> list[Any]:
        if plate is None:
            return []
        return [pyro.plate(plate, len(next(iter(data.values()))), dim=structure.plate_axes[plate])]

    return create_plates


__all__ = [
    "Coordinates",
    "Evaluation",
    "Factor",
    "Joint",
    "ParameterSpec",
    "Program",
    "Rows",
    "SiteInfo",
    "SiteView",
    "Structure",
    "Values",
    "Variable",
    "build_guide",
    "derive_seed",
    "describe",
    "discover",
    "isolated",
    "num_rows",
    "unvalidated",
]
