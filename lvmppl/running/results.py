"""From fits to the tables of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lvmppl import tables
from lvmppl.algorithms.problem import Problem
from lvmppl.compare import gaps, total_gap
from lvmppl.continuous_posteriors import ContinuousPosterior, moment_frame
from lvmppl.fitted import Fit
from lvmppl.running import writing
from lvmppl.running.preparation import Plan


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


def collect(
    plan: Plan, fits: Mapping[str, tuple[Problem, Fit]], failures: Mapping[str, str], directory: Path
) -> Run:
    """The tables of the fits that finished; of those that failed (with their messages) a row of the summary."""
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
    plan: Plan, name: str, fits: Mapping[str, tuple[Problem, Fit]], failures: Mapping[str, str]
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
