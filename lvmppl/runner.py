"""From an experiment file to fits, tables, pictures and a report: the only module that composes the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lvmppl import catalogue, data, tables
from lvmppl.algorithms import INFER
from lvmppl.algorithms.choices import choose
from lvmppl.algorithms.evidence import exact_posterior, require_exact
from lvmppl.algorithms.heldout import score_rows
from lvmppl.algorithms.mcmc import add_reference, joined, require_continuous, with_draws
from lvmppl.algorithms.problem import LIFTING, Problem, Progress, Silent, build_problem
from lvmppl.algorithms.trial import try_start
from lvmppl.compare import gaps, total_gap
from lvmppl.continuous_posteriors import ContinuousPosterior, moment_frame
from lvmppl.density import derive_seed, isolated
from lvmppl.errors import InputError, IntractableError
from lvmppl.fitted import Fit
from lvmppl.inference import bind_guide, bind_model, takes_model
from lvmppl.options import MCMCOptions, Options, VariationalOptions
from lvmppl.running import writing
from lvmppl.running.folder import publish, require_ours, staged
from lvmppl.running.writing import patient
from lvmppl.sampled_posterior import MIN_DRAWS
from lvmppl.spec import Experiment, open_experiment, to_yaml

SMOKE_STEPS = 3


@dataclass(frozen=True)
class Run:
    """What a run wrote, as DataFrames; `fits` are the results themselves and `failed` names those that failed.

    messages: what went wrong after the fits, such as a picture that could not be drawn; a line each.
    """

    directory: Path
    summary: pd.DataFrame
    history: pd.DataFrame
    parameters: pd.DataFrame
    posterior: pd.DataFrame
    gaps: pd.DataFrame
    fits: Mapping[str, Fit] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    messages: tuple[str, ...] = ()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; `message` says what was kept."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass
class _Plan:
    """An experiment made ready: everything that can be wrong with the input has been found out."""

    experiment: Experiment
    base: Path
    dataset: data.Dataset
    model: Callable[..., Any]
    dtype: torch.dtype
    builders: dict[str, Callable[[Mapping[str, Fit], Progress], Problem]]
    options: dict[str, Options]
    reference: MCMCOptions | None = None


def run(
    experiment: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run an experiment and write its folder (default `runs/<name>`).

    A fit that fails leaves a row in the summary and does not stop the others. The folder appears when everything in it
    is written; an earlier run of the same folder is replaced.

    Raises:
        InputError: the experiment, its data, model or guides are wrong; nothing has been written.
        Interrupted: Ctrl-C; the fits that had finished are written, and its message says so.
    """
    loaded, base, document = open_experiment(experiment, overrides)
    directory = Path(out) if out is not None else Path("runs") / loaded.name
    require_ours(directory)
    with isolated(derive_seed(loaded.seed, "run"), _dtype(loaded)):
        with document.located():
            plan = _prepare(loaded, base, smoke)
            order = _order(plan.options)
            _build_all(plan, order)
        with staged(directory) as staging:
            fits, failures, at = _run_fits(plan, order, progress or Silent())
            if at is not None and not fits:
                raise Interrupted(f"interrupted during fit '{at}': no fit had finished; nothing is kept")
            return _deliver(plan, fits, failures, None if at is None else f"fit '{at}'", directory, staging)


def _deliver(
    plan: _Plan,
    fits: Mapping[str, tuple[Problem, Fit]],
    failures: Mapping[str, str],
    at: str | None,
    directory: Path,
    staging: Path,
) -> Run:
    """Write what the fits gave and move it into place: tables first, for which even Ctrl-C waits.

    at: where the run has been interrupted already, if it has.

    Raises:
        Interrupted: it has been interrupted; says what is kept.
        InputError: the folder cannot be written.
    """
    text, without = to_yaml(plan.experiment), ""
    try:
        with patient() as pressed:
            result = _collect(plan, fits, failures, directory)
            frames = {name: getattr(result, name) for name in tables.SCHEMAS}
            environment = writing.write_record(staging, frames, result.fits, text)
        at = "the writing of the tables" if pressed else at
        problems, cut = writing.write_pages(staging, frames, plan.dataset, environment, text)
        if cut:
            at, without = at or "the drawing of the pictures", ", without the pictures"
        with patient():
            publish(staging, directory)
    except KeyboardInterrupt:
        raise Interrupted("interrupted before the tables were written: nothing is kept") from None
    except OSError as error:
        got = f"{error.strerror or error}"
        raise InputError(f"output folder {directory}", "a folder that can be written", got) from error
    if at is not None:
        kept = f"the results of {', '.join(fits)} are in {directory}{without}"
        raise Interrupted(f"interrupted during {at}: {kept}")
    return replace(result, messages=tuple(problems))


def check(experiment: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, bool, str]]:
    """Everything that can be wrong before a long run; fits nothing. Rows of (subject, ok, text).

    Raises:
        InputError: the first thing found wrong.
    """
    loaded, base, document = open_experiment(experiment, overrides)
    lines: list[tuple[str, bool, str]] = [
        ("experiment", True, f"'{loaded.name}': {len(loaded.fits)} fits, {loaded.dtype}")
    ]
    with isolated(derive_seed(loaded.seed, "run"), _dtype(loaded)), document.located():
        plan = _prepare(loaded, base, smoke=True)
        shapes = ", ".join(f"{k} {list(v.shape)} {str(v.dtype)[6:]}" for k, v in plan.dataset.tensors.items())
        lines.append(("data", True, f"{loaded.data.source}: {shapes}"))
        order = _order(plan.options)
        problems = _build_all(plan, order)
        first = problems[order[0]].model.structure
        sites = ", ".join(f"{s.name} ({s.family}, {s.kind})" for s in first.sites.values())
        theta = ", ".join(f"{n} {list(s.initial.shape)}" for n, s in first.parameters.items()) or "none"
        lines.append(
            ("model", True, f"sites {sites}; parameters {theta}; data plate {first.data_plate or 'none'}")
        )
        lines.append(("exact engine", True, _engine(problems[order[0]])))
        for name in order:
            lines.append((f"fit {name}", *_try_fit(problems[name], plan.options[name])))
        if plan.reference is not None:
            lines.append(("reference", *_try_fit(replace(problems[order[0]], guided=None), plan.reference)))
    return lines


def _engine(problem: Problem) -> str:
    """The engine that serves the exact posterior, tried on the first rows, or why none does."""
    structure = problem.model.structure
    if structure.data_plate is not None and not any(s.is_table for s in structure.parameters.values()):
        problem = replace(problem, data={k: v[:3] for k, v in problem.data.items()})
    try:
        return exact_posterior(problem, problem.initial).engine
    except IntractableError as error:
        return f"none: {' '.join(str(error).split())}"
    except InputError:
        raise
    except Exception as error:  # a posterior that cannot be had stops no fit by a guide
        return f"none: {_one_line(error)}"


def _try_fit(problem: Problem, options: Options) -> tuple[bool, str]:
    """One step of a fit, thrown away: (whether it went well, what came of it)."""
    try:
        fit = INFER[options.algorithm](problem, options.model_copy(update=_cut(options, 1)))
    except InputError:
        raise
    except Exception as error:  # what a run would put into the summary as a failed fit
        return False, _one_line(error)
    kind = str(fit.all_history["objective_kind"].iloc[-1]).replace("_", " ").replace("elbo", "ELBO")
    what = f"guide {fit.guide}, {kind}" if problem.guided else kind
    text = f"{options.algorithm}: one step done, {what} {float(fit.all_history['objective'].iloc[-1]):.4f}"
    for title, rows in (("E-step", fit.e_step), ("M-step", fit.m_step)):
        steps = "; ".join(f"{name}: {how} ({why})" if why else f"{name}: {how}" for name, how, why in rows)
        text += f"; {title} {steps}" if steps else ""
    text += f"; gradient {fit.estimators}" if fit.estimators else ""
    return fit.status != "diverged", text


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _cut(options: Options, steps: int) -> dict[str, Any]:
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


# ------------------------------------------------------------------------------------------------ preparation


def _dtype(experiment: Experiment) -> torch.dtype:
    return {"float32": torch.float32, "float64": torch.float64}[experiment.dtype]


def _prepare(experiment: Experiment, base: Path, smoke: bool) -> _Plan:
    dtype = _dtype(experiment)
    dataset = data.load(experiment.data, base, dtype, derive_seed(experiment.seed, "split") % 2**32)
    spec = experiment.model
    function = catalogue.resolve(spec.use, "model.use", base, "model")
    catalogue.check_tensors(function, spec.use, spec.args, tuple(dataset.tensors), "data.columns")
    catalogue.check_arguments(function, spec.args, tuple(dataset.tensors), "model.args")
    model = _bind(lambda: bind_model(function, spec.args), "model")
    options = {
        n: o.model_copy(update=_cut(o, SMOKE_STEPS)) if smoke else o for n, o in experiment.fits.items()
    }
    reference = experiment.reference
    if smoke and reference is not None:
        reference = reference.model_copy(update=_cut(reference, SMOKE_STEPS))
    plan = _Plan(experiment, base, dataset, model, dtype, {}, options, reference)
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


def _builder(plan: _Plan, name: str, options: Options) -> Callable[[Mapping[str, Fit], Progress], Problem]:
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


def _order(options: Mapping[str, Options]) -> list[str]:
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


def _build_all(plan: _Plan, order: Sequence[str]) -> dict[str, Problem]:
    """Build and evaluate every problem once before any fit runs: what is wrong with it is the user's to know now."""
    problems = {}
    try:
        plate = plan.experiment.model.data_plate
        try_start(build_problem("model", plan.model, plan.dataset.tensors, data_plate=plate))
    except InputError as error:
        raise _within("model", error) from error
    for name in order:
        where = f"fits.{name}"
        try:
            problems[name] = plan.builders[name]({}, Silent())
            if problems[name].guided is not None:
                try_start(problems[name])
            algorithm = plan.options[name].algorithm
            if algorithm in ("em", "enumeration"):
                require_exact(problems[name], algorithm)
            if algorithm == "mcmc":
                require_continuous(problems[name])
            own = plan.options[name]
            if isinstance(own, VariationalOptions):
                choose(problems[name], own)
            batch = getattr(plan.options[name], "batch_size", None)
            if batch is not None and problems[name].data_plate is None:
                raise InputError(
                    f"{where}.batch_size", "a model with a data plate", "a model without one", "leave it out"
                )
        except InputError as error:
            raise _within(where, error) from error
    if plan.experiment.reference is not None:
        refused = []
        for problem in (
            problems.values()
        ):  # em and enumeration turn priors into parameters: one fit may have no such site
            try:
                require_continuous(problem)
            except InputError as error:
                refused.append(error)
        if len(refused) == len(problems):
            expected, got = refused[0].expected, refused[0].got
            raise InputError("reference", expected, got, "leave it out: the posterior is exact") from refused[
                0
            ]
    plate = problems[order[0]].data_plate
    if plan.experiment.data.test_fraction and plate is None:
        raise InputError(
            "data.test_fraction", "a model with a data plate", "a model without one", "set it to 0"
        )
    return problems


def _within(where: str, error: InputError) -> InputError:
    """The same message, saying in which part of the experiment: `where.field` of a field, else `where: what`."""
    if error.where.startswith((f"{where}.", f"{where}:")):
        return error
    mark = "." if error.where.isidentifier() else ": "
    return type(error)(f"{where}{mark}{error.where}", error.expected, error.got, error.fix)


# ---------------------------------------------------------------------------------------------------- fitting


def _run_fits(
    plan: _Plan, order: Sequence[str], progress: Progress
) -> tuple[dict[str, tuple[Problem, Fit]], dict[str, str], str | None]:
    """Run the fits; (finished, messages of those that failed, the one that was interrupted)."""
    finished: dict[str, tuple[Problem, Fit]] = {}
    failures: dict[str, str] = {}
    for name in order:
        try:
            origin = getattr(plan.options[name], "start_from", None)
            if origin in failures:
                raise InputError(
                    f"fits.{name}.start_from", "a fit that finished", f"'{origin}', which failed"
                )
            problem = plan.builders[name]({n: f for n, (_, f) in finished.items()}, progress)
            fit = INFER[plan.options[name].algorithm](problem, plan.options[name])
            fit = _with_reference(plan, problem, fit, finished)
            finished[name] = (problem, fit)  # kept even if its scoring is interrupted
            finished[name] = (problem, _with_scores(plan, problem, fit))
            progress.done(name, fit.steps, fit.elbo if problem.guided else fit.log_evidence, fit.status)
        except KeyboardInterrupt:
            return finished, failures, name
        except Exception as error:  # a failed fit must not take the others' results with it
            failures[name] = _one_line(error)
            progress.finish("failed")
    return finished, failures, None


def _with_reference(
    plan: _Plan, problem: Problem, fit: Fit, finished: Mapping[str, tuple[Problem, Fit]]
) -> Fit:
    """The fit with the experiment's reference posterior at its θ; fits of equal θ share one."""
    options = plan.reference
    if options is None or fit.sampled is not None or fit.status == "diverged":
        return fit
    for _, other in finished.values():
        if (
            other.algorithm != "mcmc"
            and other.sampled is not None
            and _same(fit.parameters, other.parameters)
        ):
            return with_draws(fit, other.sampled)
    try:
        return add_reference(problem, fit, options)
    except Exception as error:  # the fit itself has gone well
        return replace(fit, message=joined(fit.message, f"reference failed: {_one_line(error)}"))


def _with_scores(plan: _Plan, problem: Problem, fit: Fit) -> Fit:
    """The fit with the scores of the rows held out of it, where there are any."""
    if not plan.dataset.test:
        return fit
    try:
        evidence, bound = score_rows(problem, fit, plan.model, plan.dataset.test)
    except Exception as error:  # the fit itself has gone well
        return replace(fit, message=joined(fit.message, f"held-out rows not scored: {_one_line(error)}"))
    return replace(fit, test_log_evidence=evidence, test_elbo=bound)


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def _collect(
    plan: _Plan, fits: Mapping[str, tuple[Problem, Fit]], failures: Mapping[str, str], directory: Path
) -> Run:
    summary = [
        _summary_row(plan, name, fits, failures)
        for name in plan.experiment.fits
        if name in fits or name in failures
    ]
    parts: dict[str, list[pd.DataFrame]] = {"history": [], "parameters": [], "posterior": [], "gaps": []}
    for name in plan.experiment.fits:
        if name not in fits:
            continue
        problem, fit = fits[name]
        parts["history"].append(_labelled(fit.all_history, name))
        parts["parameters"].append(_parameter_rows(name, fit))
        parts["posterior"].extend(_posterior_rows(name, problem, fit))
        parts["gaps"].append(gaps(name, fit))
    frames = {
        key: tables.validate(key, pd.concat(frames, ignore_index=True)) if frames else tables.empty(key)
        for key, frames in ((k, [f for f in v if len(f)]) for k, v in parts.items())
    }
    whole = tables.validate("summary", pd.DataFrame(summary)) if summary else tables.empty("summary")
    results = {name: fit for name, (_, fit) in fits.items()}
    bad = tuple(n for n in plan.experiment.fits if n in failures)
    return Run(
        directory,
        whole,
        frames["history"],
        frames["parameters"],
        frames["posterior"],
        frames["gaps"],
        results,
        bad,
    )


def _summary_row(
    plan: _Plan, name: str, fits: Mapping[str, tuple[Problem, Fit]], failures: Mapping[str, str]
) -> dict[str, Any]:
    options = plan.options[name]
    spec = getattr(options, "guide", None)
    row: dict[str, Any] = {"fit": name, "algorithm": options.algorithm, "guide": spec.use if spec else ""}
    if name in failures:
        blank = {c: math.nan for c in tables.SCHEMAS["summary"] if c not in row}
        return {
            **blank,
            **row,
            "status": "failed",
            "steps": 0,
            "log_evidence_kind": "none",
            "message": failures[name],
        }
    fit = fits[name][1]
    return {
        **row,
        "status": fit.status,
        "steps": fit.steps,
        "seconds": fit.seconds,
        "log_evidence": fit.log_evidence,
        "log_evidence_kind": fit.log_evidence_kind,
        "log_evidence_error": fit.log_evidence_error,
        "elbo": fit.elbo,
        "elbo_error": fit.elbo_error,
        "gap": total_gap(fit),
        "test_log_evidence": fit.test_log_evidence,
        "test_elbo": fit.test_elbo,
        "message": fit.message,
        **_chain_columns(fit),
    }


def _chain_columns(fit: Fit) -> dict[str, Any]:
    """What the summary says of the chains behind a fit's draws, where there are some."""
    found = fit.sampled
    return {} if found is None else {"rhat": found.rhat, "ess": found.ess, "divergences": found.divergences}


def _labelled(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return frame.assign(fit=pd.Series([name] * len(frame), dtype="string"))


def _parameter_rows(name: str, fit: Fit) -> pd.DataFrame:
    """A row per entry of θ; a fit that was asked for standard errors has their column."""
    parts = []
    for parameter, value in fit.parameters.items():
        if value.numel() > writing.LARGE_PARAMETER:
            continue
        index = torch.cartesian_prod(*(torch.arange(s) for s in value.shape)) if value.dim() else None
        where = [()] if index is None else index.reshape(-1, value.dim()).tolist()
        columns = {
            "parameter": parameter,
            "position": [",".join(map(str, i)) for i in where],
            "value": value.detach().double().reshape(-1).numpy(),
        }
        if fit.standard_errors:
            columns["standard_error"] = fit.standard_errors[parameter].double().reshape(-1).numpy()
        parts.append(pd.DataFrame({"fit": name, **columns}))
    if not parts:
        return pd.DataFrame(columns=["fit", "parameter", "position", "value"])
    return pd.concat(parts, ignore_index=True)


def _posterior_rows(name: str, problem: Problem, fit: Fit) -> list[pd.DataFrame]:
    """Rows of kind exact, variational and mcmc, datum numbered within the training rows."""
    frames = []
    if fit.sampled is not None:
        frames.append(fit.sampled.to_frame().assign(fit=name, kind="mcmc"))
    for kind, found in (("exact", fit.posterior), ("variational", fit.variational)):
        if found is not None and (found.variables or isinstance(found, ContinuousPosterior)):
            frames.append(found.to_frame().assign(fit=name, kind=kind))
    for site, (mean, sd) in fit.moments.items():
        local = problem.data_plate in problem.model.structure.sites[site].plates
        frames.append(moment_frame(site, mean, sd, local).assign(fit=name, kind="variational"))
    return frames
