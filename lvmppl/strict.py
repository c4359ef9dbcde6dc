"""Frozen objects that convert nothing, and what is wrong with an input in the words of the contract."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lvmppl.errors import InputError
from lvmppl.wording import listed, nearest, shown

Loc = tuple[str | int, ...]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]
Positive = Annotated[float, Field(gt=0)]


class Frozen(BaseModel):
    """A frozen object that refuses unknown fields and converts nothing."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @classmethod
    def known(cls) -> list[str]:
        """The fields, in the order in which an error lists them."""
        return list(cls.model_fields)

    @classmethod
    def remedy(cls, wrong: str) -> str:
        """What to do about a field that is not known."""
        return nearest(wrong, cls.known())


def explain(error: ValidationError, kind: type[Frozen], where: Callable[[Loc], str]) -> list[InputError]:
    """Each problem pydantic found, in the words of the contract. where: from a field's path to its place."""
    problems, seen = [], set()
    for detail in error.errors(include_url=False):
        loc = _field_path(detail["loc"])
        if loc not in seen:  # the branches of a union report one wrong value several times
            seen.add(loc)
            expected, fix = _expectation(detail, kind, loc)
            got = "nothing" if detail["type"] == "missing" else _got(detail, loc)
            problems.append(InputError(where(loc), expected, got, fix))
    return problems


def _got(detail: Any, loc: Loc) -> str:
    return shown(str(loc[-1])) if detail["type"] == "extra_forbidden" else shown(detail["input"])


def _field_path(loc: Loc) -> Loc:
    """A path without the branch names pydantic adds for unions and validated wrappers."""
    return tuple(p for p in loc if isinstance(p, int) or not any(mark in p for mark in "[]()"))


_SIMPLE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "missing": "a value",
    "invalid_key": "text as key",
}
_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
}


def _expectation(detail: Any, kind: type[Frozen], loc: Loc) -> tuple[str, str]:
    """What was expected, and what to do."""
    problem, context = detail["type"], detail.get("ctx", {})
    if problem == "extra_forbidden":
        owner = _model_at(kind, loc[:-1])
        return f"one of {listed(owner.known())}", owner.remedy(str(loc[-1]))
    if problem == "literal_error":
        choices = [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
        return listed(choices, "or"), nearest(detail["input"], choices)
    if problem in _LIMITS:
        key, words = _LIMITS[problem]
        return f"a number {words} {context[key]:g}", ""
    if problem == "value_error":
        return str(context["error"]), ""
    return _SIMPLE.get(problem, detail["msg"]), _remedy(problem, detail["input"], kind, loc)


def simple_expectation(error: ValidationError) -> tuple[str, str, bool]:
    """What a value checked against one plain type should have been, what to do, and whether that is certain.

    It is not certain where a branch of the type is beyond a YAML: a tensor, a path, a function.
    """
    expected, fixes, plain = [], [], True
    for detail in error.errors(include_url=False):
        is_list = detail["type"] == "is_instance_of" and detail["ctx"]["class"] == "Sequence"
        known = is_list or detail["type"] in _SIMPLE or detail["type"] == "literal_error"
        plain = plain and known and detail["type"] != "tuple_type"  # a YAML's list stands for a tuple too
        text, fix = ("a list", "") if is_list else _expectation(detail, Frozen, ())
        fixes.append(fix)
        expected.append(f"{text} in it" if any(isinstance(part, int) for part in detail["loc"]) else text)
    return listed(dict.fromkeys(expected), "or"), next(filter(None, fixes), ""), plain


def _remedy(problem: str, value: object, kind: type[Frozen], loc: Loc) -> str:
    """What to write instead of a value of a wrong type, where that is plain."""
    if problem == "model_type" and isinstance(value, str):
        return f"write {{{next(iter(_model_at(kind, loc).model_fields))}: {value}}}"
    if problem == "tuple_type" and isinstance(value, str):
        return f"write [{value}]"
    if problem == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if problem in ("string_type", "invalid_key") and isinstance(value, bool | int | float):
        return "put it in quotes"
    return ""


def _model_at(kind: type[Frozen], loc: Loc) -> type[Frozen]:
    """The model that stands at a path inside another one."""
    node: Any = kind
    for part in loc:
        node = next((n for b in _branches(node) for n in _inside(b, part)), node)
        kind = next((b for b in _branches(node) if isinstance(b, type) and issubclass(b, Frozen)), kind)
    return kind


def _branches(annotation: Any) -> list[Any]:
    """What a type may be: the members of a union, without the notes of Annotated."""
    if get_origin(annotation) is Annotated:
        return _branches(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [b for part in get_args(annotation) for b in _branches(part)]
    return [annotation]


def _inside(branch: Any, part: object) -> list[Any]:
    """The type of one entry of a model or mapping."""
    if get_origin(branch) is dict:
        return [get_args(branch)[1]]
    fields = branch.model_fields if isinstance(branch, type) and issubclass(branch, Frozen) else {}
    return [fields[str(part)].annotation] if str(part) in fields else []
