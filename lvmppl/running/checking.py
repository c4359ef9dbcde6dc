"""What can be said of an experiment without fitting it: shapes, sites, engine, and one step of every fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lvmppl.algorithms import INFER
from lvmppl.algorithms.evidence import exact_posterior
from lvmppl.algorithms.problem import Problem
from lvmppl.data import Dataset
from lvmppl.density import derive_seed, isolated
from lvmppl.errors import InputError, IntractableError
from lvmppl.options import Options
from lvmppl.running.preparation import build_all, fit_order, prepare, shortened, torch_dtype
from lvmppl.spec import open_experiment
from lvmppl.wording import listed, one_line


def check(experiment: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, bool, str]]:
    """Everything that can be wrong before a long run; fits nothing. Rows of (subject, ok, text).

    Raises:
        InputError: the first thing found wrong.
    """
    loaded, base, document = open_experiment(experiment, overrides)
    lines: list[tuple[str, bool, str]] = [
        ("experiment", True, f"'{loaded.name}': {len(loaded.fits)} fits, {loaded.dtype}")
    ]
    with isolated(derive_seed(loaded.seed, "run"), torch_dtype(loaded)), document.located():
        plan = prepare(loaded, base, smoke=True)
        shapes = ", ".join(f"{k} {list(v.shape)} {str(v.dtype)[6:]}" for k, v in plan.dataset.tensors.items())
        constant = listed(_constant_columns(plan.dataset), "and")
        note = f"; the same number in every row of {constant}" if constant else ""
        lines.append(("data", True, f"{loaded.data.source}: {shapes}{note}"))
        order = fit_order(plan.options)
        problems = build_all(plan, order)
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


def _constant_columns(dataset: Dataset) -> list[str]:
    """The columns of floats [N] or [N, D] that do not vary: a density that is fitted to one has no width."""
    found = []
    for name, tensor in dataset.tensors.items():
        if not tensor.is_floating_point() or tensor.dim() > 2 or len(tensor) < 2:
            continue
        columns = tensor.reshape(len(tensor), -1)
        names = dataset.columns.get(name, ())
        same = (columns == columns[0]).all(0).nonzero().flatten().tolist()
        found += [names[i] if i < len(names) else f"{name}[{i}]" for i in same]
    return found


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
        return f"none: {one_line(error)}"


def _try_fit(problem: Problem, options: Options) -> tuple[bool, str]:
    """One step of a fit, thrown away: (whether it went well, what came of it)."""
    try:
        fit = INFER[options.algorithm](problem, options.model_copy(update=shortened(options, 1)))
    except InputError:
        raise
    except Exception as error:  # what a run would put into the summary as a failed fit
        return False, one_line(error)
    kind = str(fit.all_history["objective_kind"].iloc[-1]).replace("_", " ").replace("elbo", "ELBO")
    what = f"guide {fit.guide}, {kind}" if problem.guided else kind
    text = f"{options.algorithm}: one step done, {what} {float(fit.all_history['objective'].iloc[-1]):.4f}"
    for title, rows in (("E-step", fit.e_step), ("M-step", fit.m_step)):
        steps = "; ".join(f"{name}: {how} ({why})" if why else f"{name}: {how}" for name, how, why in rows)
        text += f"; {title} {steps}" if steps else ""
    text += f"; steps {fit.compiled}" if fit.compiled else ""
    text += f"; gradient {fit.estimators}" if fit.estimators else ""
    return fit.status != "diverged", text
