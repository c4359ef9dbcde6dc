"""What every algorithm is handed: a model, perhaps a guide, their starts, the rows, and where progress goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from lvmppl.algorithms.refinement import RefinedJoint
from lvmppl.density import (
    Evaluation,
    Joint,
    ParameterSpec,
    Program,
    Rows,
    SiteInfo,
    Structure,
    Values,
    build_guide,
    check_states,
    check_steps,
    discover,
    is_autoguide,
    num_rows,
)
from lvmppl.errors import InputError, ModelError
from lvmppl.wording import nearest, shown


class Progress(Protocol):
    """Where a fit reports its steps; `update` is called at every step and must be cheap.

    `finish` ends a restart; `done` ends the fit, with the steps and the objective over all rows of what it keeps.
    """

    def start(self, fit: str, restart: int, total: int) -> None: ...
    def update(self, step: int, objective: float) -> None: ...
    def finish(self, status: str) -> None: ...
    def done(self, fit: str, steps: int, objective: float, status: str) -> None: ...


class Silent:
    """Progress that goes nowhere."""

    def start(self, fit: str, restart: int, total: int) -> None: ...
    def update(self, step: int, objective: float) -> None: ...
    def finish(self, status: str) -> None: ...
    def done(self, fit: str, steps: int, objective: float, status: str) -> None: ...


LIFTING = ("em", "enumeration")
"""Algorithms that fit global continuous latents as parameters, by MAP; the others keep them latent."""


@dataclass(frozen=True)
class Problem:
    """A model and guide bound to their data. `initial` holds the start of θ and λ, constrained."""

    name: str
    model: Joint
    guided: Joint | None
    data: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    seed: int = 0
    frozen: tuple[str, ...] = ()
    guide_name: str | None = None
    progress: Progress = field(default_factory=Silent)
    rebuild_guide: Mapping[str, Any] | None = None  # what `build_problem` builds the guide of other rows from
    first: Evaluation | None = None  # of the model's first run, on all rows at `initial`, if it was kept

    @property
    def num_rows(self) -> int:
        return num_rows(self.data)

    @property
    def data_plate(self) -> str | None:
        return self.model.structure.data_plate

    @property
    def theta(self) -> tuple[str, ...]:
        return tuple(self.model.structure.parameters)

    @property
    def integrates(self) -> bool:
        """Whether latent sites are left that are not enumerated, for an engine of continuous ones."""
        return bool(self.model.structure.continuous)

    @property
    def lifted(self) -> tuple[str, ...]:
        """Parameters that are sites of the model, with a prior."""
        return tuple(s.name for s in self.model.structure.sites.values() if s.kind == "parameter")

    @property
    def objective_kind(self) -> str:
        """What exact fits climb: log p(x; θ), or with the priors of parameters log p(x, θ)."""
        return "log_posterior" if self.lifted else "log_evidence"

    @property
    def objective_name(self) -> str:
        """The same in words, for messages."""
        return self.objective_kind.replace("_", " ")

    @property
    def free_theta(self) -> tuple[str, ...]:
        return tuple(n for n in self.theta if n not in self.frozen)

    @property
    def lambda_(self) -> tuple[str, ...]:
        structure = self.guided.guide_structure if self.guided else None
        if structure is None:
            return ()
        return tuple(n for n in structure.parameters if n not in self.model.structure.parameters)

    @property
    def free_lambda(self) -> tuple[str, ...]:
        return tuple(n for n in self.lambda_ if n not in self.frozen)

    def rows(self, indices: Tensor | None = None) -> tuple[Mapping[str, Tensor], Rows]:
        """The data of a batch (all rows when `indices` is None) and what the batch stands for."""
        if indices is None:
            return self.data, Rows(self.num_rows)
        return {k: v[indices] for k, v in self.data.items()}, Rows(self.num_rows, indices)


def build_problem(
    name: str,
    model: Callable[..., Any],
    data: Values,
    *,
    guide: Callable[..., Any] | None = None,
    guide_takes_model: bool = False,
    guide_args: Mapping[str, Any] | None = None,
    guide_name: str | None = None,
    data_plate: str | None = None,
    start: Values | None = None,
    frozen: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    lift: bool | Collection[str] = False,
    keep_first: bool = False,
) -> Problem:
    """Trace the model (and guide) once and bind them to the data.

    start: values that replace the model's or guide's own start, by name. A guide that `guide_takes_model` is built here,
    once, from the model and `guide_args`. lift: which global continuous latents are fitted as parameters, see `discover`.
    keep_first: whether the first run of the model stays with the problem, as an evaluation at `initial` without another.

    Raises:
        ModelError: the model or guide raises or breaks the contract, or their sites do not match.
        InputError: names in `frozen` or `start` that nothing has.
    """
    rebuild: dict[str, Any] | None = None
    program = Program(model, "model")
    given = start or {}
    structure, trace = discover(program, data, data_plate, lift=lift, answer=_answers(given), frozen=frozen)
    _check_observed(structure)
    guided = None
    initial: dict[str, Tensor] = {n: s.initial for n, s in structure.parameters.items()}
    if guide is not None:
        built = build_guide(guide, model, structure, **(guide_args or {})) if guide_takes_model else guide
        rebuild = {"guide": built}
        if is_autoguide(built):  # its parameters have the rows it was built on
            rebuild = {"guide": guide, "guide_takes_model": guide_takes_model, "guide_args": guide_args}
        guide_program = Program(built, "guide")
        guide_structure, _ = discover(guide_program, data, model=structure)
        check_guide(structure, guide_structure)
        kind = RefinedJoint if getattr(built, "refine_steps", 0) else Joint
        guided = kind(program, structure, guide_program, guide_structure)
        for key, spec in guide_structure.parameters.items():
            initial.setdefault(key, spec.initial)
    specs = {**(guided.specs if guided else {}), **structure.parameters}
    for key, value in given.items():
        if key in structure.parameters or (key in initial and initial[key].shape == value.shape):
            initial[key] = _checked_start(specs[key], value)
    unknown = [n for n in frozen if n not in initial]
    if unknown:
        known = f"parameters of the model or guide ({', '.join(initial) or 'there are none'})"
        raise InputError("freeze", known, ", ".join(map(shown, unknown)), nearest(unknown[0], initial))
    joint = Joint(program, structure)
    first: Evaluation | None = None
    if keep_first and _stands_at_start(structure, program, given) and not structure.continuous:
        with torch.no_grad():
            first = joint.evaluation_of(trace, Rows(structure.num_rows))
    check_steps(joint, data, initial, first)
    check_states(joint, data, initial)
    return Problem(
        name,
        joint,
        guided,
        data,
        initial,
        seed,
        tuple(frozen),
        guide_name,
        progress if progress else Silent(),
        rebuild,
        first,
    )


def _answers(given: Values) -> Callable[[str, constraints.Constraint, Tensor], Tensor]:
    """A parameter's own start, or the value that is handed in for it if that will do (if not, it is refused later)."""

    def answer(name: str, constraint: constraints.Constraint, start: Tensor) -> Tensor:
        try:
            return (
                _checked_start(ParameterSpec(name, constraint, start), given[name])
                if name in given
                else start
            )
        except InputError:
            return start

    return answer


def _stands_at_start(structure: Structure, program: Program, given: Values) -> bool:
    """Whether the first run was one at the values handed in: those of modules and of sites it did not get."""
    sites = any(s.kind == "parameter" for s in structure.sites.values())
    return not (sites or program.module is not None or any("$$$" in name for name in given))


def _checked_start(spec: ParameterSpec, value: Any) -> Tensor:
    """A value handed in for a parameter; a floating tensor or array keeps its dtype."""
    where = f"value of parameter '{spec.name}'"
    try:
        start = torch.as_tensor(value).detach().clone().to(spec.initial.device)
        start = start if hasattr(value, "dtype") and start.is_floating_point() else start.to(spec.initial)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(where, "a tensor or an array of numbers", type(value).__name__) from error
    if start.shape != spec.initial.shape:
        fix = (
            "its table has a row per datum of the data handed in"
            if spec.is_table
            else "mind the model's args"
        )
        raise InputError(where, f"shape {tuple(spec.initial.shape)}", f"shape {tuple(start.shape)}", fix)
    if start.is_floating_point() and not bool(torch.isfinite(start).all()):
        raise InputError(
            where, "finite numbers", "NaN or infinity", "a fit that diverged has none to hand on"
        )
    exact = (
        start.double() if start.is_floating_point() else start
    )  # a long float32 simplex sums to 1 in float64 only
    if not bool(spec.constraint.check(exact).all()):
        span = f"values from {float(start.min()):.6g} to {float(start.max()):.6g}"
        fix = "hand in constrained values, as `fit.parameters` holds them"
        raise InputError(where, f"values within its constraint, {spec.constraint}", span, fix)
    return start


def _check_observed(structure: Structure) -> None:
    if not any(s.kind == "observed" for s in structure.sites.values()):
        raise ModelError(
            "model",
            "at least one observed site",
            "none",
            "pass the data to pyro.sample(..., obs=x) or pyro.factor",
        )


def _states(site: SiteInfo) -> int | None:
    """The number of values of an enumerated site over consecutive whole numbers; None for any other."""
    support = site.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if site.kind != "enumerated" or not isinstance(low, int) or not isinstance(high, int):
        return None
    return high - low + 1


def check_guide(model: Structure, guide: Structure) -> None:
    """Model and guide must speak of the same latent sites, with the same plates.

    Raises:
        ModelError: a guide site the model lacks or observes, a latent site that is neither in the guide nor enumerated,
            or plates, event shape or the kind of support that differ.
    """
    for name, site in guide.sites.items():
        if name in model.sites and model.sites[name].kind == "observed":
            raise ModelError(
                f"guide site '{name}'", "a latent site of the model", "one that the model observes"
            )
        if name not in model.sites and not site.auxiliary:
            latents = ", ".join(model.latents) or "none"
            raise ModelError(
                f"guide site '{name}'",
                f"a latent site of the model ({latents})",
                "a site that the model lacks",
            )
        if name in model.sites and set(site.plates) != set(model.sites[name].plates):
            raise ModelError(
                f"guide site '{name}'",
                f"the plates it has in the model ({', '.join(model.sites[name].plates) or 'none'})",
                ", ".join(site.plates) or "none",
            )
        states = _states(site), _states(model.sites[name]) if name in model.sites else None
        if None not in states and states[0] != states[1]:
            raise ModelError(
                f"guide site '{name}'",
                f"the {states[1]} states it has in the model",
                f"{states[0]}",
                "give it as many states",
            )
        if name in model.sites and site.event_shape != model.sites[name].event_shape:
            raise ModelError(
                f"guide site '{name}'",
                f"the event shape it has in the model, {model.sites[name].event_shape}",
                f"{site.event_shape}",
                "mind .to_event",
            )
        if name in model.sites:
            _check_measure(name, model.sites[name], site)
    for name, site in model.sites.items():
        if site.kind == "latent" and name not in guide.sites:
            raise ModelError(
                f"model site '{name}'",
                "a site of the same name in the guide",
                f"a guide with {', '.join(guide.sites) or 'no sites'}",
                "add it to the guide, or mark it infer={'enumerate': 'parallel'} if it is discrete",
            )


def _check_measure(name: str, model: SiteInfo, guide: SiteInfo) -> None:
    """log p − log q has a meaning only where both are probabilities or both are densities."""
    if guide.discrete == model.discrete or guide.family == "Delta":
        return
    kinds = {True: "discrete", False: "continuous"}
    fix = "use a discrete family; `variational` has one for every finite site" if model.discrete else ""
    raise ModelError(
        f"guide site '{name}'",
        f"a {kinds[model.discrete]} family, as it has in the model ({model.family})",
        f"{guide.family}, which is {kinds[guide.discrete]}",
        fix,
    )
