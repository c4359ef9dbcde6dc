"""One evaluation of model and guide before any fit, so that what cannot be computed is known early."""

from __future__ import annotations

import torch

from lvmppl.algorithms.problem import Problem
from lvmppl.density import CheckValues, function_name
from lvmppl.errors import InputError, ModelError

_FEW_ROWS = 8192  # rows that are looked at


def try_start(problem: Problem) -> None:
    """Evaluate model and guide once at their start on the first rows.

    Raises:
        ModelError: a log-density cannot be computed, a value does not have its site's shape, or the guide
            gives one outside the support in the model.
    """
    joint = problem.guided or problem.model
    few = torch.arange(min(problem.num_rows, _FEW_ROWS)) if problem.data_plate is not None else None
    data, rows = problem.rows(few)
    try:
        with CheckValues():
            joint.evaluate(data, problem.initial, rows)
    except InputError:
        raise
    except Exception as error:
        names = [f"model '{function_name(problem.model.model.function)}'"]
        if problem.guided is not None and problem.guided.guide is not None:
            names.append(f"guide '{problem.guide_name or function_name(problem.guided.guide.function)}'")
        raise ModelError(
            " with ".join(names),
            "log-densities that can be computed at the start values",
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "look at the start values, at the shapes, and for columns that are constant",
        ) from error
