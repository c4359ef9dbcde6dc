"""An experiment made ready to run: data, model and guides in memory, and every problem built and tried once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvmppl import catalogue, data
from lvmppl.algorithms.choices import choose
from lvmppl.algorithms.evidence import require_exact
from lvmppl.algorithms.mcmc import require_continuous
from lvmppl.algorithms.problem import LIFTING, Problem, Progress, Silent, build_problem
from lvmppl.algorithms.trial import try_start
from lvmppl.density import derive_seed
from lvmppl.errors import InputError
from lvmppl.fitted import Fit
from lvmppl.inference import bind_guide, bind_model, takes_model
from lvmppl.options import MCMCOptions, Options, VariationalOptions
from lvmppl.sampled_posterior import MIN_DRAWS
from lvmppl.spec import Experiment

SMOKE_STEPS = 3


@dataclass
class Plan:
    """An experiment made ready: everything that can be wrong with the input has been found out."""

    experiment: Experiment
    base: Path
    dataset: data.Dataset
    model: Callable[..., Any]
    dtype: torch.dtype
    builders: dict[str, Callable[[Mapping[str, Fit], Progress], Problem]]
    options: dict[str, Options]
    reference: MCMCOptions | None = None


def torch_dtype(experiment: Experiment) -> torch.dtype:
    """The type of the floating data and of torch's new tensors during a run."""
    return {"float32": torch.float32, "float64": torch.float64}[experiment.dtype]


def prepare(experiment: Experiment, base: Path, smoke: bool) -> Plan:
    """Read the data and find model and guides; their arguments are checked, nothing is evaluated.

    base: where relative paths start. smoke: every fit is cut to a few steps.

    Raises:
        InputError: data, model, guides or their arguments are wrong.
    """
    dtype = torch_dtype(experiment)
    dataset = data.load(experiment.data, base, dtype, derive_seed(experiment.seed, "split") % 2**32)
    spec = experiment.model
    function = catalogue.resolve(spec.use, "model.use", base, "model")
    catalogue.check_tensors(function, spec.use, spec.args, tuple(dataset.tensors), "data.columns")
    catalogue.check_arguments(function, spec.args, tuple(dataset.tensors), "model.args")
    model = _bind(lambda: bind_model(function, spec.args), "model")
    options = {
        n: o.model_copy(update=shortened(o, SMOKE_STEPS)) if smoke else o for n, o in experiment.fits.items()
    }
    reference = experiment.reference
    if smoke and reference is not None:
        reference = reference.model_copy(update=shortened(reference, SMOKE_STEPS))
    plan = Plan(experiment, base, dataset, model, dtype, {}, options, reference)
    for name, option in options.items():
        plan.builders[name] = _builder(plan, name, option)
    return plan


def _bind(build: Callable[[], Callable[..., Any]], where: str) -> Callable[..., Any]:
    try:
        return build()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(
            where, "a class that can be built from args", f"{type(error).__name__}: {error}"
        ) from error


def _builder(plan: Plan, name: str, options: Options) -> Callable[[Mapping[str, Fit], Progress], Problem]:
    """How to build a fit's problem, given the fits that it starts from; its guide's arguments are checked now."""
    spec = getattr(options, "guide", None)
    guide: Callable[..., Any] | None = None
    guide_args: dict[str, Any] = {}
    model_aware = False
    if spec is not None:
        where = f"fits.{name}.guide"
        found = catalogue.resolve(spec.use, f"{where}.use", plan.base, "guide")
        model_aware = takes_model(found)
        model_args = plan.experiment.model.args
        if model_aware:
            catalogue.check_arguments(found, spec.args, (), f"{where}.args")
            guide, guide_args = found, dict(spec.args)
        else:
            offered = (*plan.dataset.tensors, *(a for a in model_args if a not in spec.args))
            catalogue.check_arguments(found, spec.args, offered, f"{where}.args")
            guide = _bind(lambda: bind_guide(found, spec.args, model_args), where)

    def build(done: Mapping[str, Fit], progress: Progress) -> Problem:
        origin = getattr(options, "start_from", None)
        start: dict[str, Tensor] | None = None
        if origin is not None and origin in done:
            start = {**done[origin].parameters, **done[origin].guide_parameters}
        seed = plan.experiment.seed
        torch.manual_seed(derive_seed(seed, name, "build"))
        return build_problem(
            name,
            plan.model,
            plan.dataset.tensors,
            guide=guide,
            guide_takes_model=model_aware,
            guide_args=guide_args,
            guide_name=None if spec is None else spec.use,
            data_plate=plan.experiment.model.data_plate,
            start=start,
            frozen=getattr(options, "freeze", ()),
            seed=seed,
            progress=progress,
            lift=options.algorithm in LIFTING,
        )

    return build


def shortened(options: Options, steps: int) -> dict[str, Any]:
    """The options that change in a fit of a few steps; of one step, it is only to be seen that it runs."""
    fields = type(options).model_fields
    cut: dict[str, Any] = {}
    if "max_steps" in fields:
        cut["max_steps"] = min(steps, getattr(options, "max_steps", steps))
    if "num_samples" in fields:
        draws = 1 if steps == 1 else MIN_DRAWS
        cut["num_samples"] = min(draws, getattr(options, "num_samples", draws))
        cut["warmup"] = min(draws, getattr(options, "warmup", draws))
    if "standard_errors" in fields and steps == 1:
        cut["standard_errors"] = False
    if "restarts" in fields:
        cut["restarts"] = 1 if steps == 1 else min(2, getattr(options, "restarts", 1))
    return cut


def fit_order(options: Mapping[str, Options]) -> list[str]:
    """Fits in the order of the file, each after the one it starts from."""
    done: list[str] = []

    def visit(name: str) -> None:
        origin = getattr(options[name], "start_from", None)
        if origin is not None and origin not in done:
            visit(origin)
        if name not in done:
            done.append(name)

    for name in options:
        visit(name)
    return done


def build_all(plan: Plan, order: Sequence[str]) -> dict[str, Problem]:
    """Build and evaluate every problem once before any fit runs: what is wrong with it is the user's to know now."""
    plate = plan.experiment.model.data_plate
    try:
        try_start(build_problem("model", plan.model, plan.dataset.tensors, data_plate=plate))
    except InputError as error:
        raise _within("model", error) from error
    problems = {}
    for name in order:
        try:
            problems[name] = _try_one(plan.builders[name]({}, Silent()), plan.options[name])
        except InputError as error:
            raise _within(f"fits.{name}", error) from error
    if plan.experiment.reference is not None:
        _require_reference(list(problems.values()))
    if plan.experiment.data.test_fraction and problems[order[0]].data_plate is None:
        raise InputError(
            "data.test_fraction", "a model with a data plate", "a model without one", "set it to 0"
        )
    return problems


def _try_one(problem: Problem, options: Options) -> Problem:
    """The problem, if its start can be evaluated and its algorithm takes it."""
    if problem.guided is not None:
        try_start(problem)
    if options.algorithm in ("em", "enumeration"):
        require_exact(problem, options.algorithm)
    if options.algorithm == "mcmc":
        require_continuous(problem)
    if isinstance(options, VariationalOptions):
        choose(problem, options)
        if options.batch_size is not None and problem.data_plate is None:
            raise InputError("batch_size", "a model with a data plate", "a model without one", "leave it out")
    return problem


def _require_reference(problems: Sequence[Problem]) -> None:
    """Refuse a reference that no fit can have. One may: em and enumeration turn priors into parameters, others do not."""
    refused = []
    for problem in problems:
        try:
            require_continuous(problem)
        except InputError as error:
            refused.append(error)
    if len(refused) == len(problems):
        first = refused[0]
        fix = "leave it out: the posterior is exact"
        raise InputError("reference", first.expected, first.got, fix) from first


def _within(where: str, error: InputError) -> InputError:
    """The same message, saying in which part of the experiment: `where.field` of a field, else `where: what`."""
    if error.where.startswith((f"{where}.", f"{where}:")):
        return error
    mark = "." if error.where.isidentifier() else ": "
    return type(error)(f"{where}{mark}{error.where}", error.expected, error.got, error.fix)
