"""A YAML document with the line of every entry, and overrides laid over it.

The semantics are those of `yaml.safe_load` but for two things: numbers such as `1e-8` are numbers, as in
YAML 1.2 (PyYAML reads them as text), and a key that stands twice in a mapping is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from lvmppl.errors import InputError, InputErrors
from lvmppl.strict import Loc
from lvmppl.wording import shown

_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|[-+]?\.[0-9_]+[eE][-+]?[0-9]+$")


class Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-8` as a number."""


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text "1e-8", so that it is read back as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


@dataclass(frozen=True)
class Document:
    """A document's value, the line of each path in it, and the overrides that set some of them."""

    source: str
    value: Any
    lines: dict[Loc, int]
    overrides: dict[Loc, str]

    def place(self, loc: Loc) -> str:
        """Where a path stands: `file:line: dotted`, or the override that set it or something in it."""
        dotted = ".".join(map(str, loc))
        for length in range(len(loc), -1, -1):
            prefix = loc[:length]
            if prefix in self.overrides:
                source = f"--set {self.overrides[prefix]}"
                return source if length == len(loc) else f"{source}: {dotted}"
            if prefix in self.lines:
                return f"{self.source}:{self.lines[prefix]}: {dotted}".removesuffix(": ")
            created = [text for key, text in self.overrides.items() if key[:length] == prefix]
            if created:
                return f"--set {created[-1]}: {dotted}"
        return f"{self.source}: {dotted}".removesuffix(": ")

    def created(self, loc: Loc) -> bool:
        """Whether a mapping stands here only because overrides set something in it."""
        inner = any(key[: len(loc)] == loc and key != loc for key in self.overrides)
        return inner and loc not in self.lines and loc not in self.overrides

    @contextmanager
    def located(self) -> Iterator[None]:
        """Within the block, an error whose `where` opens with a dotted field of the document says where that stands."""
        try:
            yield
        except InputErrors as error:
            raise InputErrors([self._locate(problem) for problem in error.problems]) from error
        except InputError as error:
            raise self._locate(error) from error

    def _locate(self, error: InputError) -> InputError:
        field, _, rest = error.where.partition(": ")
        loc: Loc = tuple(field.split("."))
        if not isinstance(self.value, dict) or loc[0] not in self.value:
            return error
        where = ": ".join(filter(None, (self.place(loc), rest)))
        return type(error)(where, error.expected, error.got, error.fix)

    def override(self, text: str) -> Document:
        """The document with one `dotted.key=value`; a mapping on the way is created where nothing stands."""
        key, equals, written = text.partition("=")
        loc: Loc = tuple(key.strip().split("."))
        if not equals or not all(loc):
            raise InputError(
                f"--set {text}", "KEY=VALUE with a dotted KEY", shown(text), "e.g. fits.em.restarts=3"
            )
        inner = read_document(written, f"--set {text}")
        root = copy.deepcopy(self.value)
        at = root
        for depth, part in enumerate(loc):
            if not isinstance(at, dict):
                stands = ".".join(map(str, loc[:depth])) or self.source
                raise InputError(
                    f"--set {text}", f"a mapping at {stands}", shown(at), f"set {stands} as a whole"
                )
            if depth == len(loc) - 1:
                at[part] = inner.value
            else:
                if at.get(part) is None:
                    at[part] = {}
                at = at[part]
        lines = {path: line for path, line in self.lines.items() if path[: len(loc)] != loc}
        kept = {path: other for path, other in self.overrides.items() if path[: len(loc)] != loc}
        return Document(self.source, root, lines, {**kept, loc: text})


def read_document(text: str, source: str) -> Document:
    """Read one YAML document. Raises InputError with the line where it is not YAML or a key stands twice."""
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            lines: dict[Loc, int] = {}
            if node is not None:
                _walk(node, lines, source, (), ())
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _not_yaml(error, source) from None
    except RecursionError:
        raise InputError(source, "YAML", "brackets nested too deep") from None
    except ValueError as error:  # PyYAML lets those of dates and tagged numbers through
        if isinstance(error, InputError):
            raise
        raise InputError(source, "YAML", str(error)) from None
    return Document(source, value, lines, {})


def _not_yaml(error: yaml.YAMLError, source: str) -> InputError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = source if mark is None else f"{source}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return InputError(
        where, "YAML", f"a syntax error ({problem})", "look at the quotes, colons and indentation"
    )


def _walk(node: yaml.Node, lines: dict[Loc, int], source: str, loc: Loc, above: tuple[int, ...]) -> None:
    """Note the line of every path below a node, and refuse keys that stand twice and endless aliases."""
    line = node.start_mark.line + 1
    lines.setdefault(loc, line)
    if id(node) in above:
        raise InputError(f"{source}:{line}", "an alias to something else", "one that contains itself")
    inside = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _walk(item, lines, source, (*loc, i), inside)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, here = str(key.value), key.start_mark.line + 1
            if name in first and key.tag != "tag:yaml.org,2002:merge":
                where = f"{source}:{here}: {'.'.join(map(str, (*loc, name)))}"
                raise InputError(where, "each key once", f"a second one (the first is in line {first[name]})")
            first[name] = lines[(*loc, name)] = here
            _walk(value, lines, source, (*loc, name), inside)
