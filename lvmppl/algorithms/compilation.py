"""The option `compile`: whether steps repeat arithmetic that was worked out before, in the place of the model function.

EM has the whole model in tables (`tabulation`), and the step of several restarts on little data is recorded
(`batched_step`); coordinate ascent of variational EM records E_q log p (`expectation`).

    never     the model function itself runs in every step: the reference to compare with
    auto      tables wherever the model allows it; recorded where a step is so small that preparing it is most of it
    always    whatever the size; a step that cannot do without the model function ends the fit, and says why
"""

from __future__ import annotations

from lvmppl.algorithms.problem import Problem
from lvmppl.errors import InputError


def not_compiled(problem: Problem, why: str) -> InputError:
    """What ends a fit under `compile: always` whose steps must run the model function."""
    return InputError(
        f"fit '{problem.name}': compile",
        "auto or never",
        "always",
        f"its steps must run the model function: {why}",
    )


__all__ = ["not_compiled"]
