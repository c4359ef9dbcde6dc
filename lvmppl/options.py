"""The options of each algorithm: one frozen object a fit, the same from a YAML and from Python.

An unknown option is refused with the nearest known name; a value of the wrong type is never converted (a bool
is no number, a float no whole number).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from lvmppl.errors import InputError

Loc = tuple[str | int, ...]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Count = Annotated[int, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_as_tuple)]
Positive = Annotated[float, Field(gt=0)]
Optimizer = Literal[
    "lbfgs",
    "adam",
    "sgd",
    "adamw",
    "rmsprop",
    "adagrad",
    "adadelta",
    "adamax",
    "nadam",
    "radam",
    "rprop",
    "asgd",
]


class Frozen(BaseModel):
    """A frozen object that refuses unknown fields and converts nothing."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class CallableSpec(Frozen):
    """A model or a guide: where it is found, and the arguments it is given.

    use: a catalogue name, `package.module:name`, or `file.py:name` relative to the experiment.
    """

    use: Name
    args: dict[str, Any] = Field(default_factory=dict)


class Options(Frozen):
    """What every algorithm takes.

    compile: `auto` is decided before the first step, never switched within a fit.
    """

    algorithm: str
    compile: Literal["auto", "always", "never"] = "auto"


class IterativeOptions(Options):
    """What every algorithm takes that maximises an objective over θ.

    tolerance: relative change of the objective below which (strictly) a fit has converged; 0 never stops.
    init: `params` is the model's own values; `kmeans` and `random` are such responsibilities and one M-step.
    learning_rate: None is the optimizer's own, see `rate`.
    clip_norm: largest norm of the gradient, None for no limit.
    start_from: the fit whose final parameters are this one's start. freeze: parameters kept at their start.
    """

    max_steps: Count = 500
    tolerance: Annotated[float, Field(ge=0)] = 1e-8
    init: Literal["params", "kmeans", "random"] = "params"
    optimizer: Optimizer = "lbfgs"
    learning_rate: Positive | None = None
    clip_norm: Positive | None = None
    start_from: Name | None = None
    freeze: Names = ()

    @property
    def rate(self) -> float:
        """The learning rate in effect: as given, else 1 for L-BFGS and 0.01 for the others."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "lbfgs" else 0.01


class Schedule(Frozen):
    """A number that moves from `start` to `end` over the first `steps` steps of a fit (None: all of them), then stays."""

    start: Annotated[float, Field(ge=0)]
    end: Annotated[float, Field(ge=0)]
    steps: Count | None = None

    def progress(self, step: int, max_steps: int) -> float:
        """The share of the way that is done at a step, 0 … 1."""
        return min(1.0, step / (self.steps or max_steps))


class Temperature(Schedule):
    """A temperature that falls geometrically: start^(1 − t) · end^t at the share t of its steps."""

    start: Positive = 1.0
    end: Positive = 0.1

    def at(self, step: int, max_steps: int) -> float:
        share = self.progress(step, max_steps)
        return float(self.start ** (1 - share) * self.end**share)


class Annealing(Schedule):
    """The weight β of the KL terms, linear from start to end."""

    start: Annotated[float, Field(ge=0)] = 0.0
    end: Annotated[float, Field(ge=0)] = 1.0

    def at(self, step: int, max_steps: int) -> float:
        return self.start + (self.end - self.start) * self.progress(step, max_steps)


EstimatorName = Literal[
    "auto", "enumeration", "pathwise", "score_function", "gumbel_softmax", "straight_through"
]


class SiteEstimator(Frozen):
    """How the gradient of a site's λ is estimated.

    baseline: of `score_function`, what is taken off the learning signal: the `leave_one_out` mean of the other particles,
    the `running_mean` of earlier steps, `learned` from the datum by a small network, or `none`; `auto` is leave_one_out
    with several particles, else running_mean. temperature: of `gumbel_softmax` and `straight_through`.
    """

    use: EstimatorName = "auto"
    baseline: Literal["auto", "none", "running_mean", "leave_one_out", "learned"] = "auto"
    temperature: Temperature = Temperature()

    @model_validator(mode="after")
    def _settings_belong(self) -> SiteEstimator:
        if self.baseline != "auto" and self.use != "score_function":
            raise ValueError(f"a baseline only with score_function, not with {self.use}")
        relaxed = self.use in ("gumbel_softmax", "straight_through")
        if self.temperature != Temperature() and not relaxed:
            raise ValueError(
                f"a temperature only with gumbel_softmax or straight_through, not with {self.use}"
            )
        return self


class Objective(Frozen):
    """What a fit climbs: the ELBO, or the importance-weighted bound of K draws (Burda et al. 2016).

    num_samples: K, 5 when None.
    """

    use: Literal["elbo", "importance_weighted"]
    num_samples: Count | None = None

    @model_validator(mode="after")
    def _settings_belong(self) -> Objective:
        if self.num_samples is not None and self.use == "elbo":
            raise ValueError("num_samples only with importance_weighted (num_particles are the ELBO's draws)")
        return self


def _spelling(value: object) -> str:
    """Which spelling of an option a value is: a name, one thing with settings, or by site."""
    if not isinstance(value, dict):
        return "(name)" if not isinstance(value, BaseModel) else "(one)"
    return "(one)" if "use" in value else "(sites)"


EstimatorOption = Annotated[
    Annotated[EstimatorName, Tag("(name)")] | Annotated[SiteEstimator, Tag("(one)")], Discriminator(_spelling)
]
EstimatorOptions = Annotated[
    Annotated[EstimatorName, Tag("(name)")]
    | Annotated[SiteEstimator, Tag("(one)")]
    | Annotated[dict[Name, EstimatorOption], Tag("(sites)")],
    Discriminator(_spelling),
]
ObjectiveOption = Annotated[
    Annotated[Literal["elbo", "importance_weighted"], Tag("(name)")] | Annotated[Objective, Tag("(one)")],
    Discriminator(lambda value: "(one)" if isinstance(value, dict | BaseModel) else "(name)"),
]
Weight = Annotated[
    Annotated[float, Field(ge=0), Tag("(name)")] | Annotated[Annealing, Tag("(one)")],
    Discriminator(lambda value: "(one)" if isinstance(value, dict | BaseModel) else "(name)"),
]


class VariationalOptions(IterativeOptions):
    """What the algorithms with a guide take.

    optimizer: one of torch.optim. schedule: of the learning rate over `max_steps`; `linear` ends at zero. None is the
    optimizer's own: constant for L-BFGS, else linear.
    batch_size: rows a step, None for all. num_particles: draws a step. estimator: of the gradient of λ, one for all sites
    or by site; `auto` chooses by site. objective: the bound that is climbed.
    kl_weight: β of the KL terms in the gradient, free_bits: nats of KL a site and datum (on average over a batch) below
    which a site's KL has no gradient; neither changes what is reported, the bound at β = 1.
    patience: windows without a new best after which a fit stops. validation_fraction: share of the rows that no step
    sees and whose ELBO `patience` then watches.
    """

    guide: CallableSpec | None = None
    optimizer: Optimizer = "adam"
    schedule: Literal["linear", "constant", "cosine", "exponential"] | None = None
    batch_size: Count | None = None
    num_particles: Count = 1
    estimator: EstimatorOptions = "auto"
    objective: ObjectiveOption = "elbo"
    kl_weight: Weight = 1.0
    free_bits: Annotated[float, Field(ge=0)] = 0.0
    patience: Count | None = None
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def num_samples(self) -> int | None:
        """K of the importance-weighted bound, None of the ELBO."""
        chosen = self.objective
        chosen = Objective(use=chosen) if isinstance(chosen, str) else chosen
        return (chosen.num_samples or 5) if chosen.use == "importance_weighted" else None

    def site_estimator(self, site: str) -> SiteEstimator:
        """What was asked for a site."""
        chosen = self.estimator
        if isinstance(chosen, dict):
            chosen = chosen.get(site, "auto")
        return SiteEstimator(use=chosen) if isinstance(chosen, str) else chosen

    @property
    def rate_schedule(self) -> str:
        """The schedule in effect."""
        return self.schedule or ("constant" if self.optimizer == "lbfgs" else "linear")


class ExactOptions(IterativeOptions):
    """What the algorithms on the exact log evidence take.

    restarts: restart 0 starts as `init` says, the others at random; the best is kept.
    standard_errors: whether to report standard errors of θ̂, from the observed information.
    """

    restarts: Count = 1
    standard_errors: bool = False


class EnumerationOptions(ExactOptions):
    """Gradient ascent on the exact log evidence."""

    algorithm: Literal["enumeration"] = "enumeration"


class EMOptions(ExactOptions):
    """Expectation maximisation. m_steps: updates of an M-step by gradient; a closed form counts as one."""

    algorithm: Literal["em"] = "em"
    m_steps: Count = 20


class VEMOptions(VariationalOptions):
    """Variational EM: `e_steps` updates of λ, then `m_steps` of θ, in turn.

    e_step, m_step: `auto` is a closed form wherever there is one, `gradient` none. A sweep of closed forms over q's local
    sites counts as one update; its global sites have one a round.
    """

    algorithm: Literal["vem"] = "vem"
    e_step: Literal["auto", "gradient"] = "auto"
    m_step: Literal["auto", "gradient"] = "auto"
    restarts: Count = 1
    e_steps: Count = 20
    m_steps: Count = 20


class SVIOptions(VariationalOptions):
    """Stochastic variational inference: λ and θ together, on minibatches.

    restarts: as for `enumeration`; where the objective is an estimate, compared by its mean over the last quarter.
    """

    algorithm: Literal["svi"] = "svi"
    restarts: Count = 1
    max_steps: Count = 2000
    tolerance: Annotated[float, Field(ge=0)] = 0.0


class MCMCOptions(Options):
    """Hamiltonian Monte Carlo (NUTS) on the latent variables at fixed θ."""

    algorithm: Literal["mcmc"] = "mcmc"
    num_samples: Count = 1000
    warmup: Annotated[int, Field(ge=0)] = 500
    chains: Count = 1


ALGORITHMS: dict[str, type[Options]] = {
    "enumeration": EnumerationOptions,
    "em": EMOptions,
    "vem": VEMOptions,
    "svi": SVIOptions,
    "mcmc": MCMCOptions,
}


class InputErrors(InputError):
    """Everything that is wrong with one input, a line each."""

    def __init__(self, problems: Iterable[InputError]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        super().__init__(first.where, first.expected, first.got, first.fix)
        self.args = ("\n".join(str(problem) for problem in self.problems),)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


def parse_options(algorithm: str, options: Mapping[str, Any], where: str) -> Options:
    """The options of one fit, checked.

    algorithm: a key of ALGORITHMS. options: the option table's names without `algorithm`.
    where: what the errors name, to which the option is appended with a dot.
    Raises InputErrors with one line for each wrong option.
    """
    problems = [unknown_algorithm(algorithm, where)] if algorithm not in ALGORITHMS else []
    if problems:
        raise InputErrors(problems)
    kind = ALGORITHMS[algorithm]
    try:
        return kind.model_validate({**options, "algorithm": algorithm})
    except ValidationError as error:
        raise InputErrors(explain(error, kind, lambda loc: ".".join([where, *map(str, loc)]))) from None


def unknown_algorithm(algorithm: object, where: str) -> InputError:
    return InputError(
        where, f"an algorithm of {listed(ALGORITHMS)}", shown(algorithm), nearest(algorithm, ALGORITHMS)
    )


def explain(error: ValidationError, kind: type[BaseModel], where: Callable[[Loc], str]) -> list[InputError]:
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


def _expectation(detail: Any, kind: type[BaseModel], loc: Loc) -> tuple[str, str]:
    """What was expected, and what to do."""
    problem, context = detail["type"], detail.get("ctx", {})
    if problem == "extra_forbidden":
        return _known_fields(kind, loc)
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
        text, fix = ("a list", "") if is_list else _expectation(detail, Options, ())
        fixes.append(fix)
        expected.append(f"{text} in it" if any(isinstance(part, int) for part in detail["loc"]) else text)
    return listed(dict.fromkeys(expected), "or"), next(filter(None, fixes), ""), plain


def _remedy(problem: str, value: object, kind: type[BaseModel], loc: Loc) -> str:
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


def _known_fields(kind: type[BaseModel], loc: Loc) -> tuple[str, str]:
    """The fields known where an unknown one stood; the nearest, or the algorithms whose option it is."""
    owner = _model_at(kind, loc[:-1])
    known = sorted(
        (f for f in owner.model_fields if f != "algorithm"), key=lambda f: f in Options.model_fields
    )
    wrong = str(loc[-1])
    owners = [name for name, options in ALGORITHMS.items() if wrong in options.model_fields]
    if issubclass(owner, Options) and owners:
        return f"one of {listed(known)}", f"{wrong} is an option of {listed(owners)} only"
    return f"one of {listed(known)}", nearest(wrong, known)


def _model_at(kind: type[BaseModel], loc: Loc) -> type[BaseModel]:
    """The model that stands at a path inside another one."""
    node: Any = kind
    for part in loc:
        node = next((n for b in _branches(node) for n in _inside(b, part)), node)
        kind = next((b for b in _branches(node) if isinstance(b, type) and issubclass(b, BaseModel)), kind)
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
    fields = branch.model_fields if isinstance(branch, type) and issubclass(branch, BaseModel) else {}
    return [fields[str(part)].annotation] if str(part) in fields else []


def nearest(name: object, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`did you mean '…'?` for the known name that is most alike, or nothing."""
    alike = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=cutoff)
    return f"did you mean '{alike[0]}'?" if alike else ""


def listed(names: Iterable[str], last: str = "") -> str:
    """Names in a row; `last` stands before the last one."""
    words = list(names)
    if last and len(words) > 1:
        return f"{', '.join(words[:-1])} {last} {words[-1]}"
    return ", ".join(words)


def shown(value: object) -> str:
    """A value as an error shows it: with its type where that tells more, and not longer than a line."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    if isinstance(value, dict):
        return f"the mapping {text}"
    if isinstance(value, list | tuple):
        return f"the list {text}"
    return {bool: str(value).lower(), type(None): "nothing"}.get(type(value), text)
