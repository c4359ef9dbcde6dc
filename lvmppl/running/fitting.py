"""The fits of an experiment one after the other, each with its reference posterior and its held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lvmppl.algorithms import INFER
from lvmppl.algorithms.heldout import score_rows
from lvmppl.algorithms.mcmc import add_reference, joined, with_draws
from lvmppl.algorithms.problem import Problem, Progress
from lvmppl.errors import InputError
from lvmppl.fitted import Fit
from lvmppl.running.preparation import Plan
from lvmppl.wording import one_line


def run_fits(
    plan: Plan, order: Sequence[str], progress: Progress
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
            failures[name] = one_line(error)
            progress.finish("failed")
    return finished, failures, None


def _with_reference(
    plan: Plan, problem: Problem, fit: Fit, finished: Mapping[str, tuple[Problem, Fit]]
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
        return replace(fit, message=joined(fit.message, f"reference failed: {one_line(error)}"))


def _with_scores(plan: Plan, problem: Problem, fit: Fit) -> Fit:
    """The fit with the scores of the rows held out of it, where there are any."""
    if not plan.dataset.test:
        return fit
    try:
        evidence, bound = score_rows(problem, fit, plan.model, plan.dataset.test)
    except Exception as error:  # the fit itself has gone well
        return replace(fit, message=joined(fit.message, f"held-out rows not scored: {one_line(error)}"))
    return replace(fit, test_log_evidence=evidence, test_elbo=bound)


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())
