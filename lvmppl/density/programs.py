"""A model or guide as a callable of the data tensors, and the user's own errors with their place."""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn

from lvmppl.density.structure import Values
from lvmppl.errors import InputError, ModelError


class Program:
    """A model or guide as a callable of the data tensors, its module's weights (if any) handed in by name.

    `function` is called with the data as keywords. A `torch.nn.Module` contributes `<prefix>.<dotted name>` for each
    of its own parameters, and keeps its own tensors untouched.
    """

    def __init__(self, function: Callable[..., Any], role: str) -> None:
        self.function = function
        self.role = role
        self.module = function if isinstance(function, nn.Module) else None
        for part in self.module.modules() if self.module is not None else ():
            _keep_own_parameters(part)

    def weights(self) -> dict[str, nn.Parameter]:
        """The module's own nn.Parameters (PyroParams excepted: those come as parameter statements)."""
        if self.module is None:
            return {}
        return {
            f"{self.role}.{name}": p
            for name, p in self.module.named_parameters()
            if p.requires_grad and not name.endswith("_unconstrained")
        }

    def __call__(self, data: Values, values: Values) -> None:
        try:
            if self.module is None:
                self.function(**data)
            else:
                swapped = {name: values[f"{self.role}.{name}"] for name in self._weight_names(values)}
                torch.func.functional_call(self.module, swapped, args=(), kwargs=dict(data))
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # a program that exits would take the whole run with it
            raise as_model_error(self.role, self.function, error) from error

    def _weight_names(self, values: Values) -> Iterator[str]:
        prefix = f"{self.role}."
        assert self.module is not None
        own = dict(self.module.named_parameters())
        return (
            name[len(prefix) :] for name in values if name.startswith(prefix) and name[len(prefix) :] in own
        )


def _keep_own_parameters(module: nn.Module) -> None:
    """A PyroModule that was built with Pyro's global parameter store in mind announces its parameters without it."""
    context = getattr(module, "_pyro_context", None)
    if context is not None and not hasattr(context, "param_state"):
        context.param_state = {"params": {}, "constraints": {}}


def function_name(function: Callable[..., Any]) -> str:
    """What the user calls a model or guide, whatever its arguments have been bound with."""
    own = unbound(function)
    return str(getattr(own, "__name__", type(own).__name__))


def unbound(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside `functools.partial`s."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def as_model_error(role: str, function: Callable[..., Any], error: BaseException) -> ModelError:
    """The user's own error with its file and line: the last frame outside Pyro, torch and this package's engine."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (
        "/lvmppl/density/",
        "/site-packages/pyro/",
        "/site-packages/torch/",
        "/contextlib.py",
        "/lvmppl/families.py",
    )
    outside = [f for f in frames if not any(part in f.filename for part in ours)]
    place = f"{outside[-1].filename}:{outside[-1].lineno}" if outside else "its own code"
    name, detail = function_name(function), " ".join(str(error).split())[:600]
    shipped = (getattr(unbound(function), "__module__", None) or "").startswith("lvmppl.")
    got = detail if shipped and isinstance(error, ValueError) else f"{type(error).__name__}: {detail}"
    if shipped:  # there is nothing to mend in it
        where, expected = f"{role} '{name}'", "arguments and data that it accepts"
        return ModelError(where, expected, got, f"change the {role}'s args, or the data")
    if clash := _CLASH.search(detail):
        inner, outer, dim = clash.groups()
        return ModelError(
            f"{role} '{name}' at {place}",
            "an axis of its own for every plate",
            f"dim={dim} for both '{outer}' and '{inner}', which is entered inside it",
            f"write pyro.plate('{outer}', …, dim={int(dim) - 1}), further left than the plates inside",
        )
    return ModelError(
        f"{role} '{name}' at {place}",
        f"a {role} that runs on these data",
        got,
        next((fix for part, fix in _FIXES.items() if part in detail), None)
        or f"mend the {role} there (`lvmppl check` runs it once without fitting)",
    )


_CLASH = re.compile(r'plates "([^"]+)" and "([^"]+)",? collide at dim=(-?\d+)')

# by a part of Pyro's or torch's own message
_FIXES = {
    "Shape mismatch inside plate": "give the site the plate's size at the plate's dim, or make that axis part of the event"
    " with .to_event(1)",
    "is out of bounds for dimension 0 with size 1": "an enumerated site has size 1 along plates that do not tell its"
    " elements apart; if it is such a value that is indexed here, sample the rows of a group inside the group's plate"
    " (an axis more, padded under a mask)",
}


@contextmanager
def swapped_modules(values: Values) -> Iterator[None]:
    """Within the block `pyro.module(name, net)` computes with the tensors in `values`; `net` gets its own back after.

    Pyro ties such parameters to the module by identity in its global store, which this library never uses.
    """
    original = pyro.module
    undo: list[tuple[nn.Module, str, Any]] = []

    def module(name: str, nn_module: nn.Module, update_module_params: bool = False) -> nn.Module:
        result: nn.Module = original(name, nn_module)
        for dotted, _ in list(nn_module.named_parameters()):
            full = f"{name}$$${dotted}"
            if full in values:
                owner_path, _, leaf = dotted.rpartition(".")
                owner = nn_module.get_submodule(owner_path)
                undo.append((owner, leaf, owner._parameters[leaf]))
                owner._parameters[leaf] = values[full]  # type: ignore[assignment]
        return result

    pyro.module = module
    try:
        yield
    finally:
        pyro.module = original
        for owner, leaf, saved in reversed(undo):
            owner._parameters[leaf] = saved
