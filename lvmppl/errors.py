"""The errors that speak to a user: one message that says where, what was expected, what was got and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """The user's input is wrong.

    The message reads ``where: expected …, got …; what to do``. The commands print it alone and exit with status 2.
    """

    def __init__(self, where: str, expected: str = "", got: str = "", fix: str = "") -> None:
        self.where, self.expected, self.got, self.fix = where, expected, got, fix
        # Pyro's tracer makes an error anew from its message and a table of shapes
        message = f"{where}: expected {expected}, got {got}" if expected else where
        super().__init__(f"{message}; {fix}" if fix else message)

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str, str]]:
        return type(self), (self.where, self.expected, self.got, self.fix)


class InputErrors(InputError):
    """Everything that is wrong with one input, a line each."""

    def __init__(self, problems: Iterable[InputError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.where, first.expected, first.got, first.fix)
        self.args = ("\n".join(str(problem) for problem in self.problems),)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


class IntractableError(InputError):
    """No exact answer can be had; the message names the sites in the way and what to use instead."""


class ModelError(InputError):
    """The user's model or guide raised, or breaks a rule of the contract; the original error is chained."""
