"""The Python face: `fit` and `posterior` for a model, a dictionary of tensors and, perhaps, a guide."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lvmppl.algorithms import INFER
from lvmppl.algorithms.evidence import CHUNK, exact_posterior
from lvmppl.algorithms.heldout import serve
from lvmppl.algorithms.outcome import finish
from lvmppl.algorithms.problem import LIFTING, Problem, Progress, build_problem
from lvmppl.continuous_posteriors import ContinuousPosterior
from lvmppl.density import derive_seed, isolated, num_rows
from lvmppl.errors import InputError
from lvmppl.fitted import Fit
from lvmppl.options import Options, VEMOptions, parse_options
from lvmppl.posteriors import Posterior
from lvmppl.wording import listed, nearest

Data = Mapping[str, Any]


def fit(
    model: Callable[..., Any],
    data: Data,
    algorithm: str = "em",
    *,
    guide: Callable[..., Any] | None = None,
    data_plate: str | None = None,
    seed: int = 0,
    start_from: Fit | None = None,
    **options: Any,
) -> Fit:
    """Fit θ (and λ) of a model written in Pyro; every option of the YAML is a keyword.

    model: any callable that takes the data as keywords. data: tensors (or arrays) that share their first axis, the rows.
    algorithm: `em`, `enumeration`, `vem`, `svi`, or `mcmc`, which holds θ at its start and draws from the posterior.
    guide: for vem and svi; a guide with a parameter `model` is built from the model first, as Pyro's autoguides are.
    start_from: an earlier fit whose parameters are this one's start.

    The dtype is that of the floating data, else torch's default. Nothing global survives the call.

    Raises:
        InputError: the data, an option, the model or the guide is wrong; the message says what to do.
        IntractableError: the algorithm needs an exact posterior that does not exist.
    """
    parsed = parse_options(algorithm, options, f"fit(algorithm='{algorithm}')")
    _check_callable("model", model)
    if guide is not None:
        _check_callable("guide", guide)
    if algorithm in ("vem", "svi") and guide is None:
        raise InputError(
            f"fit(algorithm='{algorithm}')",
            "a guide",
            "none",
            "pass guide=…, such as lvmppl.guides' categorical",
        )
    if algorithm in ("em", "enumeration", "mcmc") and guide is not None:
        raise InputError(
            f"fit(algorithm='{algorithm}')", "no guide", "a guide", "leave it out, or use vem or svi"
        )
    tensors = as_tensors(data)
    with isolated(derive_seed(seed, "fit"), dtype_of(tensors)):
        problem = build_problem(
            "fit",
            model,
            tensors,
            **_guided(guide),
            data_plate=data_plate,
            start=None if start_from is None else {**start_from.parameters, **start_from.guide_parameters},
            frozen=getattr(parsed, "freeze", ()),
            seed=seed,
            lift=algorithm in LIFTING,
        )
        return run_problem(problem, parsed)


def posterior(
    model: Callable[..., Any],
    data: Data,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    data_plate: str | None = None,
) -> Posterior | ContinuousPosterior:
    """The exact posterior p(z | x; θ) and log evidence, at `parameters` or at the model's own start.

    Parameters that are left out stand at the model's own start.
    A global latent site that `parameters` names is a parameter (what `em` and `enumeration` make of it): it stands at
    that value, and its prior is not part of the log evidence.

    Raises:
        IntractableError: there is none; the message names the sites in the way and what to use instead.
        InputError: the data, the model or a parameter is wrong.
    """
    _check_callable("model", model)
    tensors = as_tensors(data)
    with isolated(derive_seed(0, "posterior"), dtype_of(tensors)):
        problem = build_problem(
            "posterior",
            model,
            tensors,
            data_plate=data_plate,
            start=parameters,
            lift=tuple(parameters or ()),
            keep_first=num_rows(tensors) <= CHUNK,
        )
        unknown = [n for n in parameters or () if n not in problem.theta]
        if unknown:
            raise _unknown_parameters(unknown, list(problem.theta))
        return exact_posterior(problem, problem.initial)


def _unknown_parameters(unknown: list[str], known: list[str]) -> InputError:
    """Every name that the model has not, each beside the one most like it."""
    alike = [(name, nearest(name, known)) for name in unknown]
    got = listed(f"'{name}'" + (f" ({guess})" if guess else "") for name, guess in alike)
    expected = (
        f"parameters of the model ({listed(known)})" if known else "nothing: the model has no parameter"
    )
    return InputError("parameters", expected, got, "leave out what is to stand at the model's own start")


def variational_posterior(
    model: Callable[..., Any],
    data: Data,
    fit: Fit,
    *,
    guide: Callable[..., Any],
    data_plate: str | None = None,
    seed: int = 0,
) -> Fit:
    """q(z; λ) of new rows at a fit's θ, and their bound.

    An encoder's λ applies as it is; a table with a row per datum, and an autoguide over the latents of all rows, are
    optimised for the new rows. θ is held. guide: the one that the fit was made with.

    The result is a fit of the new rows: `variational` and `moments` describe q, `elbo_per_datum` and `elbo` are the bound
    (nats), `posterior` and `log_evidence` are exact at the same θ where they exist.

    Raises:
        InputError: the data are wrong, or the guide is not the fit's.
    """
    tensors = as_tensors(data)
    with isolated(derive_seed(seed, "variational_posterior"), dtype_of(tensors)):
        problem = build_problem(
            "variational_posterior",
            model,
            tensors,
            **_guided(guide),
            data_plate=data_plate,
            start=fit.parameters,
            seed=seed,
        )
        found = serve(problem, fit)
        return finish(problem, VEMOptions(), [found], found)


def run_problem(problem: Problem, options: Options) -> Fit:
    """Run one algorithm on a problem that is already built."""
    return INFER[options.algorithm](problem, options)


def as_tensors(data: Data) -> dict[str, Tensor]:
    """Tensors from tensors, arrays and lists; names are the model's keywords."""
    if not isinstance(data, Mapping) or not data:
        raise InputError("data", "a dictionary of named tensors", type(data).__name__, "write {'x': x}")
    result = {}
    for name, value in data.items():
        try:
            with (
                warnings.catch_warnings()
            ):  # nothing writes to the data, a memory map opened for reading among them
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"data['{name}']", "a tensor or an array of numbers", type(value).__name__
            ) from error
        # a sum is NaN if any entry is; ±inf can make it so too, which is why the entries have the last word
        if tensor.is_floating_point() and bool(tensor.sum().isnan()) and bool(torch.isnan(tensor).any()):
            rows = (
                torch.nonzero(torch.isnan(tensor.reshape(len(tensor), -1)).any(1)).flatten()
                if tensor.dim()
                else tensor
            )
            fix = "leave such rows out, or put any number there that the model hides by .mask(seen)"
            raise InputError(
                f"data['{name}']", "no missing values", f"NaN in row {int(rows.flatten()[0])}", fix
            )
        result[name] = tensor
    return result


def dtype_of(data: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the floating data, else torch's default."""
    kinds = {t.dtype for t in data.values() if t.is_floating_point()}
    if len(kinds) > 1:
        raise InputError(
            "data", "one floating dtype", ", ".join(sorted(map(str, kinds))), "convert them to one"
        )
    return kinds.pop() if kinds else torch.get_default_dtype()


def takes_model(guide: Callable[..., Any] | None) -> bool:
    """Whether a guide is built from the model (Pyro's autoguide convention): it has a parameter called `model`."""
    if guide is None or isinstance(guide, nn.Module):
        return False
    try:
        return "model" in inspect.signature(guide).parameters
    except (TypeError, ValueError):
        return False


def bind_guide(
    guide: Callable[..., Any], args: Mapping[str, Any], model_args: Mapping[str, Any]
) -> Callable[..., Any]:
    """A guide with its args and those of the model's args it has a parameter for."""
    names = inspect.signature(guide).parameters
    shared = {k: v for k, v in model_args.items() if k in names and k not in args}
    if isinstance(guide, type):
        built: Callable[..., Any] = guide(**shared, **args)
        return built
    return functools.partial(guide, **shared, **args)


def bind_model(model: Callable[..., Any], args: Mapping[str, Any]) -> Callable[..., Any]:
    """A model that takes the data alone: a class is built once from `args`, a function is called with them each time."""
    if isinstance(model, type):
        built: Callable[..., Any] = model(**args)
        return built
    return functools.partial(model, **args) if args else model


def _check_callable(role: str, value: Any) -> None:
    """Raise InputError if a model or guide is no function, such as a name that only a YAML knows."""
    if not callable(value):
        got = f"the text {value!r}" if isinstance(value, str) else type(value).__name__
        fix = f"names are for a YAML's `use:`; import the function from lvmppl.{role}s, or write one"
        raise InputError(f"{role}", f"a {role} function", got, fix)


def _guided(guide: Callable[..., Any] | None) -> dict[str, Any]:
    """What `build_problem` is told of a guide."""
    name = None if guide is None else str(getattr(guide, "__name__", type(guide).__name__))
    return {"guide": guide, "guide_takes_model": takes_model(guide), "guide_name": name}


__all__ = [
    "Progress",
    "as_tensors",
    "bind_guide",
    "bind_model",
    "dtype_of",
    "fit",
    "posterior",
    "run_problem",
    "takes_model",
    "variational_posterior",
]
