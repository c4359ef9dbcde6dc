"""States of enumerated sites: chosen by a walk back through the eliminations, and to and from values by site.

Within the walk every site's states have the axes of all plates, in one order, of size 1 where it does not lie in them.
Shapes: S samples, K states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lvmppl.density import Variable
from lvmppl.errors import InputError
from lvmppl.exact.conditionals import gather
from lvmppl.exact.elimination import Step


def walk(
    tape: Sequence[Step],
    variables: Mapping[str, Variable],
    order: Sequence[str],
    plate_sizes: Mapping[str, int],
    num_samples: int,
    choose: Callable[[Tensor], Tensor],
    device: torch.device,
) -> dict[str, Tensor]:
    """States by site, [S, *all plates (size 1 where it has none)], chosen from each conditional in reverse order."""
    chosen: dict[str, Tensor] = {}
    for step in reversed(tape):
        logits = gather(step.clique, step.variable, chosen, order)
        shape = [
            logits.shape[0],
            num_samples,
            *(plate_sizes[p] if p in step.plates else 1 for p in order),
        ]
        chosen[step.variable] = choose(logits.expand(shape))
    for name, variable in variables.items():  # sites with a single state never enter the tape
        if variable.steps is not None:
            continue
        shape = [num_samples, *(plate_sizes[p] if p in variable.plates else 1 for p in order)]
        chosen.setdefault(name, torch.zeros(shape, dtype=torch.long, device=device))
    return chosen


def as_support(
    states: Mapping[str, Tensor], variables: Mapping[str, Variable], order: Sequence[str], squeeze: bool
) -> dict[str, Tensor]:
    """Values by site from states by site [S, *all plates]: [S, *plates], or [*plates] if `squeeze`."""
    result = {}
    for name, variable in variables.items():
        index = states[name]
        drop = [1 + i for i, p in enumerate(order) if p not in variable.plates]
        if variable.steps is None:  # a chain's states come with its own plates only
            index = index.squeeze(drop) if drop else index
        have = [p for p in order if p in variable.plates]
        tail = range(1 + len(have), index.dim())  # the steps of a chain
        index = index.permute(0, *(1 + have.index(p) for p in variable.plates), *tail)
        values = index if variable.steps is not None else variable.support[index]
        result[name] = values.squeeze(0) if squeeze else values
    return result


def as_index(
    value: Tensor, variable: Variable, order: Sequence[str], plate_sizes: Mapping[str, int]
) -> Tensor:
    """States [S, *all plates] of one site from its values [S?, *plates].

    Raises:
        InputError: a shape that is not that of its plates, or values that are outside of its support.
    """
    event = variable.support.dim() - 1 if variable.steps is None else 1
    lead = value.dim() - event - len(variable.plates)
    if lead not in (0, 1):
        raise InputError(
            f"log_prob: site '{variable.name}'",
            f"values with axes for plates {variable.plates}, perhaps a sample axis before them",
            f"shape {tuple(value.shape)}",
        )
    value = value if lead else value.unsqueeze(0)
    wanted = [plate_sizes[p] for p in variable.plates] + ([variable.steps] if variable.steps else [])
    if list(value.shape[1 : 1 + len(wanted)]) != wanted:
        raise InputError(
            f"log_prob: site '{variable.name}'",
            f"values of shape {tuple(wanted)}, perhaps with a sample axis before it",
            f"shape {tuple(value.shape[1 - lead :])}",
        )
    if variable.steps is not None:
        if bool((value < 0).any()) or bool((value >= variable.size).any()):
            raise InputError(
                f"log_prob: site '{variable.name}'", f"states from 0 to {variable.size - 1}", "others"
            )
        have = [p for p in order if p in variable.plates]
        return value.long().permute(0, *(1 + variable.plates.index(p) for p in have), value.dim() - 1)
    flat = variable.support.reshape(variable.size, *[1] * (value.dim() - event), *variable.support.shape[1:])
    match = flat == value.unsqueeze(0)
    match = match.flatten(match.dim() - event).all(-1) if event else match
    if not bool(match.any(0).all()):
        raise InputError(f"log_prob: site '{variable.name}'", "values in its support", "a value outside it")
    index = match.to(torch.uint8).argmax(0)
    have = [p for p in order if p in variable.plates]
    index = index.permute(0, *(1 + variable.plates.index(p) for p in have))
    for i, plate in enumerate(order):
        if plate not in variable.plates:
            index = index.unsqueeze(1 + i)
    return index


__all__ = ["as_index", "as_support", "walk"]
