"""The options of each algorithm: the table of the contract, and what is refused with which message."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from lvmppl.errors import InputError
from lvmppl.options import ALGORITHMS, EMOptions, GradientOptions, InputErrors, SVIOptions, parse_options

# option -> (algorithms that take it, default by algorithm)
CONTRACT: dict[str, dict[str, Any]] = {
    "max_steps": {"em": 500, "enumeration": 500, "vem": 500, "svi": 2000},
    "tolerance": {"em": 1e-8, "enumeration": 1e-8, "vem": 1e-8, "svi": 0.0},
    "init": dict.fromkeys(["em", "enumeration", "vem", "svi"], "params"),
    "restarts": dict.fromkeys(["em", "enumeration", "vem", "svi"], 1),
    "optimizer": {"enumeration": "lbfgs", "vem": "adam", "svi": "adam"},
    "learning_rate": dict.fromkeys(["enumeration", "vem", "svi"]),
    "clip_norm": dict.fromkeys(["enumeration", "vem", "svi"]),
    "batch_size": dict.fromkeys(["vem", "svi"]),
    "num_particles": dict.fromkeys(["vem", "svi"], 1),
    "objective": dict.fromkeys(["vem", "svi"], "elbo"),
    "e_steps": {"vem": 20},
    "m_steps": {"vem": 20, "em": 20},
    "num_samples": {"mcmc": 1000},
    "warmup": {"mcmc": 500},
    "chains": {"mcmc": 1},
    "start_from": dict.fromkeys(["em", "enumeration", "vem", "svi"]),
    "freeze": dict.fromkeys(["em", "enumeration", "vem", "svi"], ()),
    "compile": dict.fromkeys(["em", "enumeration", "vem", "svi", "mcmc"], "auto"),
}


@pytest.mark.parametrize("option", CONTRACT)
def test_option_defaults_equal_the_contract(option: str) -> None:
    found = {
        name: getattr(parse_options(name, {}, "fit"), option)
        for name, kind in ALGORITHMS.items()
        if option in kind.model_fields
    }
    assert found == CONTRACT[option]


def test_every_option_of_an_iterative_algorithm_is_kept_as_given() -> None:
    common: dict[str, Any] = {
        "max_steps": 7,
        "tolerance": 1e-3,
        "init": "random",
        "start_from": "other",
        "freeze": ["weights", "loc"],
        "restarts": 4,
        "standard_errors": True,
        "compile": "never",
    }
    own: dict[str, dict[str, Any]] = {
        "em": {"m_steps": 3, "acceleration": "squarem"},
        "enumeration": {"optimizer": "sgd", "learning_rate": 2, "clip_norm": 0.5},
    }
    for algorithm, special in own.items():
        given = {**common, **special}
        kept = parse_options(algorithm, given, "fit").model_dump()
        assert {**kept, "freeze": list(kept["freeze"])} == {"algorithm": algorithm, **given}


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"optimizer": "lbfgs"}, 1.0),
        ({"optimizer": "adam"}, 0.01),
        ({"optimizer": "adam", "learning_rate": 0.3}, 0.3),
    ],
)
def test_learning_rate_in_effect_follows_the_optimizer(options: dict[str, Any], rate: float) -> None:
    parsed = parse_options("svi", options, "fit")
    assert isinstance(parsed, GradientOptions)
    assert parsed.rate == rate


def test_options_are_frozen() -> None:
    options = EMOptions()
    with pytest.raises(ValidationError):
        options.restarts = 3  # type: ignore[misc]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("em", {"restart": 3}, "fit.restart: expected one of max_steps, .*; did you mean 'restarts'"),
    ("em", {"restarts": True}, "fit.restarts: expected a whole number, got true"),
    ("em", {"restarts": 2.0}, "fit.restarts: expected a whole number, got 2.0; write 2"),
    ("em", {"restarts": "2"}, "fit.restarts: expected a whole number, got '2'"),
    ("em", {"restarts": None}, "fit.restarts: expected a whole number, got nothing"),
    ("em", {"restarts": 0}, "fit.restarts: expected a number above 0, got 0"),
    ("em", {"max_steps": -1}, "fit.max_steps: expected a number above 0, got -1"),
    ("em", {"tolerance": -1e-3}, "fit.tolerance: expected a number of at least 0, got -0.001"),
    ("em", {"tolerance": "1e-8"}, "fit.tolerance: expected a number, got '1e-8'"),
    ("em", {"tolerance": False}, "fit.tolerance: expected a number, got false"),
    ("em", {"tolerance": float("nan")}, "fit.tolerance: expected a finite number, got nan"),
    ("enumeration", {"learning_rate": 0}, "fit.learning_rate: expected a number above 0, got 0"),
    ("enumeration", {"learning_rate": float("inf")}, "fit.learning_rate: expected a finite number, got inf"),
    (
        "em",
        {"init": "kmean"},
        "fit.init: expected params, kmeans or random, got 'kmean'; did you mean 'kmeans'",
    ),
    (
        "enumeration",
        {"optimizer": "lbgfs"},
        "expected lbfgs, adam, .* rprop or asgd, got 'lbgfs'; did you mean 'lbfgs'",
    ),
    ("em", {"freeze": "weights"}, r"fit.freeze: expected a list, got 'weights'; write \[weights\]"),
    ("em", {"freeze": ["loc", 3]}, "fit.freeze.1: expected text, got 3"),
    ("em", {"optimizer": "adam"}, "optimizer is an option of enumeration, vem, svi only"),
    ("em", {"guide": {"use": "categorical"}}, "guide is an option of vem, svi only"),
    ("em", {"num_samples": 3}, "num_samples is an option of mcmc only"),
    ("svi", {"e_steps": 3}, "e_steps is an option of vem only"),
    ("svi", {"e_steps": 3}, "e_steps is an option of vem only"),
    ("svi", {"batch_size": 0}, "fit.batch_size: expected a number above 0, got 0"),
    (
        "svi",
        {"guide": "categorical"},
        "fit.guide: expected a mapping, got 'categorical'; write {use: categorical}",
    ),
    (
        "svi",
        {"guide": {"ues": "a", "use": "b"}},
        "fit.guide.ues: expected one of use, args, got 'ues'; did you mean",
    ),
    ("svi", {"guide": {"args": {}}}, "fit.guide.use: expected a value, got nothing"),
    ("svi", {"guide": {"use": "a", "args": [1]}}, r"fit.guide.args: expected a mapping, got the list \[1\]"),
    ("mcmc", {"warmup": -1}, "fit.warmup: expected a number of at least 0, got -1"),
    ("mcmc", {"start_from": "em"}, "start_from is an option of enumeration, em, vem, svi only"),
    (
        "vmc",
        {},
        "fit: expected an algorithm of enumeration, em, vem, svi, mcmc, got 'vmc'; did you mean 'vem'",
    ),
]


@pytest.mark.parametrize(("algorithm", "options", "message"), REFUSED)
def test_wrong_option_is_refused_with_a_message(
    algorithm: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_options(algorithm, options, "fit")


def test_all_wrong_options_come_in_one_message_a_line_each() -> None:
    with pytest.raises(InputErrors) as caught:
        parse_options("em", {"restarts": "x", "tolerance": "y", "foo": 1}, "fit")
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["fit.foo", "fit.restarts", "fit.tolerance"]
    assert [str(problem) for problem in caught.value.problems] == lines


def test_errors_survive_pickling() -> None:
    with pytest.raises(InputErrors) as caught:
        parse_options("em", {"restarts": "x", "tolerance": "y"}, "fit")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_whole_numbers_are_accepted_where_a_number_is_wanted() -> None:
    options = parse_options("svi", {"learning_rate": 1, "tolerance": 0}, "fit")
    assert isinstance(options, SVIOptions)
    assert (options.learning_rate, options.tolerance) == (1.0, 0.0)
