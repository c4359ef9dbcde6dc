"""The experiment file as frozen, checked objects.

Everything wrong with a file comes in one message, a line each:
`file:line: dotted.field: expected …, got …; what to do`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, PlainValidator, SerializeAsAny, ValidationError

from lvmppl.document import Document, Dumper, read_document
from lvmppl.errors import InputError, InputErrors
from lvmppl.options import (
    ALGORITHMS,
    CallableSpec,
    MCMCOptions,
    Options,
    VariationalOptions,
    unknown_algorithm,
)
from lvmppl.strict import Frozen, Loc, Name, explain
from lvmppl.wording import listed, nearest, shown


def _file_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]{0,99}", name):
        raise ValueError("a name of letters, digits, _ and - that can name a file")
    return name


def _keyword(name: str) -> str:
    if not name.isidentifier():
        raise ValueError("a tensor's name that is a Python identifier")
    return name


def _columns(value: object) -> object:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("a column's name or a list of them")
    return value


FileName = Annotated[str, AfterValidator(_file_name)]
Keyword = Annotated[str, AfterValidator(_keyword)]
Columns = Annotated[str | list[str], PlainValidator(_columns)]


class DataSpec(Frozen):
    """Where the rows come from.

    columns: the model's keyword -> a column's name for a tensor [N], a list of names for [N, D].
    """

    source: Name
    columns: dict[Keyword, Columns] = Field(default_factory=dict)
    standardize: bool = False
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    sequence: Name | None = None
    time: Name | None = None
    args: dict[str, Any] = Field(default_factory=dict)


class ModelSpec(CallableSpec):
    """The generative model.

    data_plate: the plate of the rows, where it is neither called `data` nor the only one of size N.
    """

    data_plate: Name | None = None


class Experiment(Frozen):
    """A whole experiment file, every option filled in."""

    name: FileName
    seed: Annotated[int, Field(ge=0)] = 0
    dtype: Literal["float32", "float64"] = "float64"
    data: DataSpec
    model: ModelSpec
    fits: dict[FileName, SerializeAsAny[Options]]
    reference: MCMCOptions | None = None


def load_experiment(path_or_name: str | Path, overrides: Sequence[str] = ()) -> tuple[Experiment, Path]:
    """An experiment and the folder that its relative paths start from.

    path_or_name: a file, or the name of a shipped experiment.
    overrides: `dotted.key=value`, the value in YAML.
    Raises InputErrors with everything that is wrong.
    """
    experiment, base, _ = open_experiment(path_or_name, overrides)
    return experiment, base


def open_experiment(
    path_or_name: str | Path, overrides: Sequence[str] = ()
) -> tuple[Experiment, Path, Document]:
    """The same with the document itself, which knows the line of every field."""
    path = find_experiment(path_or_name)
    document = read_document(_read(path), str(path))
    for override in overrides:
        document = document.override(override)
    return _build(document, path.stem), path.resolve().parent, document


def shipped_experiments() -> dict[str, Path]:
    """Name -> file of the experiments inside the package."""
    folder = Path(str(resources.files("lvmppl.experiments")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_experiment(path_or_name: str | Path) -> Path:
    """The file of an experiment given by path or by the name of a shipped one."""
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_experiments()
    if str(path_or_name) in shipped:
        return shipped[str(path_or_name)]
    known = f"an experiment file, or a shipped experiment ({', '.join(shipped)})"
    got = "a folder" if path.is_dir() else "nothing of that name"
    raise InputError(str(path_or_name), known, got, nearest(path.stem, shipped))


def to_yaml(experiment: Experiment) -> str:
    """The experiment as a file that loads to an equal one."""
    return yaml.dump(experiment.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            str(path), "a YAML file in UTF-8", f"byte {error.object[error.start]:#04x}"
        ) from None
    except OSError as error:
        raise InputError(str(path), "a readable file", error.strerror or str(error)) from None


def _build(document: Document, stem: str) -> Experiment:
    if not isinstance(document.value, dict):
        raise InputError(document.place(()), "a mapping (name, data, model, fits)", shown(document.value))
    raw = {"name": stem, **document.value}
    fits, problems = _fits(raw.get("fits"), document)
    try:
        experiment = Experiment.model_validate({**raw, "fits": fits})
    except ValidationError as error:
        problems = [*explain(error, Experiment, document.place), *problems]
    if problems:
        raise InputErrors(problems)
    return experiment


def _fits(raw: Any, document: Document) -> tuple[Any, list[InputError]]:
    """The options of each fit, and what is wrong with them."""
    example = "write fits: {em: {algorithm: em}}"
    if not isinstance(raw, dict) or not raw:
        return {}, [
            InputError(document.place(("fits",)), "a mapping of at least one fit", shown(raw), example)
        ]
    fits: dict[Any, Options] = {}
    problems: list[InputError] = []
    for name, given in raw.items():
        try:
            fits[name] = _fit(name, given, raw, document)
        except InputErrors as error:
            problems.extend(error.problems)
            fits[name] = Options(algorithm="")  # stands in, so that the name is checked with the others
    return fits, problems


def _fit(name: Any, given: Any, raw: Mapping[Any, Any], document: Document) -> Options:
    loc: Loc = ("fits", name)
    place = document.place
    if not isinstance(given, dict):
        raise InputErrors([InputError(place(loc), "a mapping", shown(given), "write {algorithm: em}")])
    algorithm = given.get("algorithm")
    if algorithm is None and document.created(
        loc
    ):  # a slip in a fit's name, as in `--set fits.emm.restarts=3`
        others = [str(other) for other in raw if not document.created(("fits", other))]
        known = f"a fit of the file ({listed(others)}), or a new one with an algorithm"
        fix = nearest(name, others) or f"set fits.{name}.algorithm too"
        raise InputErrors([InputError(place(loc), known, shown(name), fix)])
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise InputErrors([unknown_algorithm(algorithm, place((*loc, "algorithm")))])
    kind = ALGORITHMS[algorithm]
    problems = []
    if issubclass(kind, VariationalOptions) and given.get("guide") is None:
        fix = "write guide: {use: categorical}"
        problems.append(
            InputError(place((*loc, "guide")), f"a guide, which {algorithm} needs", "nothing", fix)
        )
    problems += _start(name, raw, place)
    try:
        options = kind.model_validate(given)
    except ValidationError as error:
        problems += explain(error, kind, lambda inner: place((*loc, *inner)))
    if problems:
        raise InputErrors(problems)
    return options


def _start(name: Any, raw: Mapping[Any, Any], place: Callable[[Loc], str]) -> list[InputError]:
    """What is wrong with where a fit starts: there is no such fit, or it starts from itself in the end."""
    where = place(("fits", name, "start_from"))
    chain = [name]
    while isinstance(raw.get(chain[-1]), dict):
        origin = raw[chain[-1]].get("start_from")
        if not isinstance(origin, str):
            return []
        if origin not in raw:
            others = [str(other) for other in raw if other != name]
            known = f"another fit ({', '.join(others)})" if others else "another fit (there is none)"
            wrong = InputError(where, known, shown(origin), nearest(origin, others))
            return [wrong] if len(chain) == 1 else []
        if origin in chain:
            circle = " → ".join(map(str, [*chain, origin]))
            return (
                [InputError(where, "a fit that does not start from this one", circle)]
                if origin == name
                else []
            )
        chain.append(origin)
    return []
