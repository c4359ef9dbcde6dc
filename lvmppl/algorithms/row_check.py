"""Whether model and guide speak of the same rows under minibatches.

Rows are handed in and indices never are, so a plate's own indices count 0 … B − 1 whatever the batch. A parameter with a
row per datum that stands outside the data plate and is read as `table[i]` would then give its first B rows to every
batch, which nothing else would notice.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lvmppl.algorithms.problem import Problem
from lvmppl.errors import ModelError


def check_row_indices(problem: Problem, batch_size: int, start: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are read by the place of a row in its batch.

    Found by doing: of a batch of the last B rows, the gradient of log p − log q must not stop at row B of a parameter of N
    rows. A shared parameter that happens to have N rows is read the same for any batch and passes.

    Raises:
        ModelError: names the parameter.
    """
    joint, total = problem.guided or problem.model, problem.num_rows
    suspects = [
        name
        for name, spec in joint.specs.items()
        if not spec.is_table and start[name].dim() and len(start[name]) == total > batch_size
    ]
    if not suspects:
        return
    data, rows = problem.rows(torch.arange(total - batch_size, total))
    leaves = {n: start[n].detach().clone().requires_grad_() for n in suspects}
    with torch.enable_grad():
        found = joint.evaluate(data, {**start, **leaves}, rows)
        parts = [f.log_prob[torch.isfinite(f.log_prob)].sum() for f in (*found.factors, *found.guide_factors)]
        value = torch.stack(parts).sum()
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(suspects, gradients, strict=True):
        touched = torch.zeros(0) if gradient is None else gradient.reshape(total, -1).abs().amax(1).nonzero()
        if len(touched) and int(touched.max()) < batch_size:
            raise ModelError(
                f"parameter '{name}'",
                f"a row per datum inside plate '{problem.data_plate}', whose batch rows are then handed out",
                f"{total} rows outside of it, read by a row's place in its batch",
                f"write pyro.param('{name}', init, event_dim=…) inside the plate and use it without an index",
            )


__all__ = ["check_row_indices"]
