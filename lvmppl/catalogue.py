"""What can be named in an experiment: models, guides and data sources, and how a name becomes a function.

The tables are explicit; nothing is found by scanning modules. torch comes only with what a name stands for.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from lvmppl.errors import InputError, InputErrors
from lvmppl.strict import simple_expectation
from lvmppl.wording import listed, nearest, shown

Kind = Literal["model", "guide"]

MODELS: dict[str, tuple[str, str]] = {
    "factor_analysis": (
        "lvmppl.models.factor_analysis:factor_analysis",
        "Gaussian factors behind the data; noise diagonal, or spherical (probabilistic PCA)",
    ),
    "gaussian_mixture": (
        "lvmppl.models.mixture:gaussian_mixture",
        "a mixture of Gaussians; covariance full, tied, diag or spherical",
    ),
    "lda": ("lvmppl.models.lda:lda", "latent Dirichlet allocation of documents as terms and counts"),
    "factorial_hidden_markov": (
        "lvmppl.models.factorial_hmm:factorial_hidden_markov",
        "several hidden Markov chains whose levels add up to what is observed",
    ),
    "hidden_markov": (
        "lvmppl.models.hmm:hidden_markov",
        "a hidden Markov model; emission categorical, gaussian, poisson or bernoulli",
    ),
    "linear_gaussian": (
        "lvmppl.models.state_space:linear_gaussian",
        "a linear-Gaussian state space (a Kalman filter's model) of sequences",
    ),
    "local_level": ("lvmppl.models.state_space:local_level", "a random walk seen through noise"),
}

GUIDES: dict[str, tuple[str, str]] = {
    "categorical": ("lvmppl.guides.categorical:categorical", "a table of state probabilities, a row a datum"),
    "categorical_encoder": (
        "lvmppl.guides.categorical:categorical_encoder",
        "state probabilities from a network of the datum (amortized)",
    ),
    "variational": (
        "lvmppl.guides.variational:variational",
        "any head (normal, gamma, chain, …) with any source (table, mlp, gru, bag_of_words)",
    ),
    "mean_field": (
        "lvmppl.guides.variational:mean_field",
        "a λ per datum in a table; the head of each site by its support",
    ),
    "amortized": (
        "lvmppl.guides.variational:amortized",
        "λ from an encoder network of the datum; the head of each site by its support",
    ),
    "semi_amortized": (
        "lvmppl.guides.variational:semi_amortized",
        "an encoder, then a few steps up each datum's own ELBO",
    ),
    "point": ("lvmppl.guides.variational:point", "one value a continuous latent (MAP), a row a datum"),
    "flow": (
        "lvmppl.guides.variational:flow",
        "a normalizing flow a continuous latent (extra `flows`)",
    ),
    "auto_delta": ("pyro.infer.autoguide:AutoDelta", "a point at each continuous latent (MAP)"),
    "auto_diagonal_normal": (
        "pyro.infer.autoguide:AutoDiagonalNormal",
        "independent Gaussians, all continuous latents in one vector",
    ),
    "auto_low_rank_multivariate_normal": (
        "pyro.infer.autoguide:AutoLowRankMultivariateNormal",
        "a Gaussian whose covariance is low rank plus diagonal",
    ),
    "auto_multivariate_normal": (
        "pyro.infer.autoguide:AutoMultivariateNormal",
        "a Gaussian with full covariance over all continuous latents",
    ),
    "auto_normal": ("pyro.infer.autoguide:AutoNormal", "independent Gaussians, a site at a time"),
}

# What a source holds, and names for `data.columns`; one name may stand for many columns.
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "breast_cancer": (
        "569 tumours, 30 measurements, benign or malignant (scikit-learn)",
        ("measurements", "benign"),
    ),
    "diabetes": (
        "442 patients, 10 measurements and the progression after a year (scikit-learn)",
        ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6", "measurements", "progression"),
    ),
    "digits": ("1797 handwritten digits, 8 × 8 pixels (scikit-learn)", ("pixels", "digit")),
    "iris": (
        "150 irises, 4 measurements, three species (scikit-learn)",
        ("sepal_length", "sepal_width", "petal_length", "petal_width", "measurements", "species"),
    ),
    "lee_background": (
        "300 news texts as token ids or document-term counts (gensim, extra `text`)",
        ("tokens", "lengths"),
    ),
    "nile": ("the yearly flow of the Nile, 1871 to 1970 (statsmodels)", ("year", "volume")),
    "sunspots": ("the yearly number of sunspots, 1700 to 2008 (statsmodels)", ("year", "activity")),
    "wine": (
        "178 wines, 13 chemical measurements, three cultivars (scikit-learn)",
        ("measurements", "cultivar"),
    ),
}

_TABLES: dict[Kind, dict[str, tuple[str, str]]] = {"model": MODELS, "guide": GUIDES}


def resolve(use: str, where: str, base: Path, kind: Kind) -> Callable[..., Any]:
    """The function or class a `use:` names.

    use: a catalogue name, `package.module:name`, or `file.py:name` relative to base.
    where: what the errors name.
    Raises InputError when there is no such thing, or its module does not import: with the module's own error.
    """
    table = _TABLES[kind]
    origin, _, name = (table[use][0] if use in table else use).rpartition(":")
    is_module = all(part.isidentifier() for part in origin.split("."))
    if not name.isidentifier() or not (origin.endswith(".py") or is_module):
        other = next((k for k, t in _TABLES.items() if use in t), None)
        fix = f"'{use}' is a {other}" if other else nearest(use, table)
        expected = f"a {kind} of the catalogue ({listed(table)}), package.module:name or file.py:name"
        raise InputError(where, expected, shown(use), fix)
    module = _load_file(base / origin, where) if origin.endswith(".py") else _import(origin, where)
    found = getattr(module, name, None)
    if found is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(where, f"a function or class in {origin}", shown(name), nearest(name, public))
    if not callable(found):
        raise InputError(
            where, f"a function or class called {name} in {origin}", f"a value of type {type(found).__name__}"
        )
    function: Callable[..., Any] = found
    return function


def check_arguments(
    function: Callable[..., Any], args: Mapping[str, Any], data_names: Collection[str], where: str
) -> None:
    """Check args against a signature before anything runs.

    Data tensors count as given, and so does a parameter `model`, which a guide factory gets from the runner.
    Values are checked where the parameter is annotated with plain types.
    Raises InputErrors, a line for each argument.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in callables have no signature to check
        return
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = set(data_names) | {"model"}
    open_names = [n for n in named if n not in given]
    problems = []
    for name, value in args.items():
        if name not in named and not anything:
            known = f"one of {listed(open_names)}" if open_names else "no arguments"
            problems.append(InputError(f"{where}.{name}", known, shown(name), nearest(name, open_names)))
        elif name == "model" or (name in given and not isinstance(function, type)):
            expected = "the experiment's model" if name == "model" else f"the tensor {name} of data.columns"
            problems.append(InputError(f"{where}.{name}", f"{expected} alone", shown(value), "leave it out"))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in args and name not in given:
            fix = "add it here" if isinstance(function, type) else "add it here, or to data.columns"
            problems.append(InputError(f"{where}.{name}", "a value", "nothing", fix))
    problems += _wrong_values(function, args, {n: p.default for n, p in named.items()}, where)
    if problems:
        raise InputErrors(problems)


def check_tensors(
    function: Callable[..., Any], use: str, args: Collection[str], names: Collection[str], where: str
) -> None:
    """Check that a model takes every tensor of the data: a function's own parameters, or those of a class's call.

    use, args: what the model is called, and the names of its arguments. names: the tensors.

    Raises InputErrors, a line for each tensor, at `where.<name>`.
    """
    call: Any = function
    if isinstance(function, type):
        call = getattr(function, "forward", None) or function.__call__
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if isinstance(function, type):
        named, args = named[1:], ()  # without self; a class has had its arguments when it is called
    taken = [p.name for p in named if p.name not in args]
    tensors = [p.name for p in named if p.name in taken and (p.name in names or p.default is p.empty)]
    open_names = [n for n in taken if n not in names]
    problems = [
        InputError(
            f"{where}.{name}",
            f"a tensor that {use} takes ({listed(tensors) or 'it takes none'})",
            shown(name),
            nearest(name, open_names) or "remove it, or call it as the model does",
        )
        for name in names
        if name not in taken
    ]
    if problems:
        raise InputErrors(problems)


def _wrong_values(
    function: Callable[..., Any], args: Mapping[str, Any], defaults: Mapping[str, Any], where: str
) -> list[InputError]:
    """Values that contradict the plain types (numbers, text, Literal, lists of them) of their annotations."""
    target = vars(function).get("__init__", function) if isinstance(function, type) else function
    try:
        hints = typing.get_type_hints(target)
    except Exception:  # annotations that name what only a type checker sees
        return []
    problems = []
    for name, value in args.items():
        if name not in hints or name not in defaults or value is defaults[name]:
            continue
        try:
            adapter = TypeAdapter(hints[name], config=ConfigDict(arbitrary_types_allowed=True, strict=True))
            adapter.validate_python(value)
        except ValidationError as error:
            expected, fix, plain = simple_expectation(error)
            if plain:
                problems.append(InputError(f"{where}.{name}", expected, shown(value), fix))
        except (PydanticUserError, TypeError):  # not a type that can be checked
            continue
    return problems


def _import(name: str, where: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            fix = "install it, or write file.py:name for a file beside the experiment"
            raise InputError(
                where, "a module that can be imported", f"no module named {error.name}", fix
            ) from None
        raise _broken(error, None, where, name) from error
    except (Exception, SystemExit) as error:
        raise _broken(error, None, where, name) from error


def _load_file(path: Path, where: str) -> types.ModuleType:
    """Run a Python file as a module of its own.

    Its name is one that nobody imports, so that it shadows no package; it stands in sys.modules all the same,
    as pickling and dataclasses need. Model and guide of one file share a module; a changed file runs anew.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            where, "a Python file", f"{path} ({reason})", "a path is relative to the experiment"
        ) from None
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"lvmppl_file_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    try:
        # compiled here, because an ordinary import would leave a __pycache__ beside the user's file
        exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, Exception | SystemExit):
            raise _broken(error, path, where, path.name) from error
        raise
    return module


def _broken(error: BaseException, path: Path | None, where: str, name: str) -> InputError:
    """An import that failed: the module's own error, with the file and line where it was raised."""
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
        reason = f"SyntaxError: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if path is not None and f.filename == str(path)]
        outside = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
        frame = (own or outside or list(frames))[-1]
        place = f"{frame.filename}:{frame.lineno}"
        reason = f"{type(error).__name__}: {error}"
    return InputError(where, f"{name} to import without error", f"{reason} ({place})", "correct it there")
