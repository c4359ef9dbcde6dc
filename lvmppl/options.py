"""The options of each algorithm: one frozen object a fit, the same from a YAML and from Python.

An unknown option is refused with the nearest known name; a value of the wrong type is never converted (a bool
is no number, a float no whole number).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError

from lvmppl.errors import InputError, InputErrors
from lvmppl.settings import (
    Annealing,
    EstimatorOptions,
    Objective,
    ObjectiveOption,
    Schedule,
    SiteEstimator,
    Temperature,
    Weight,
)
from lvmppl.strict import Count, Frozen, Name, Names, Positive, explain
from lvmppl.wording import listed, nearest, shown

__all__ = [
    "ALGORITHMS",
    "Annealing",
    "CallableSpec",
    "Compile",
    "EMOptions",
    "EnumerationOptions",
    "ExactOptions",
    "GradientOptions",
    "InputErrors",
    "IterativeOptions",
    "MCMCOptions",
    "Objective",
    "Options",
    "SVIOptions",
    "Schedule",
    "SiteEstimator",
    "Temperature",
    "VEMOptions",
    "VariationalOptions",
    "parse_options",
    "unknown_algorithm",
]

Compile = Literal["auto", "always", "never"]
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


class CallableSpec(Frozen):
    """A model or a guide: where it is found, and the arguments it is given.

    use: a catalogue name, `package.module:name`, or `file.py:name` relative to the experiment.
    """

    use: Name
    args: dict[str, Any] = Field(default_factory=dict)


class Options(Frozen):
    """What every algorithm takes.

    compile: whether steps repeat recorded arithmetic in the place of running the model function; `auto` is decided before
    the first step, never switched within a fit.
    """

    records: ClassVar[bool] = False
    """Whether the algorithm has steps that can be recorded."""

    algorithm: str
    compile: Compile = "auto"

    @property
    def unrecorded(self) -> str:
        """What there is to say of an algorithm without such steps that was asked to record them."""
        asked = self.compile == "always" and not self.records
        return (
            f"compile: {self.algorithm} runs the model in every step, it has nothing to record"
            if asked
            else ""
        )

    @classmethod
    def known(cls) -> list[str]:
        """The algorithm's own options first, what every algorithm takes last; `algorithm` itself goes without saying."""
        fields = (field for field in cls.model_fields if field != "algorithm")
        return sorted(fields, key=lambda field: field in Options.model_fields)

    @classmethod
    def remedy(cls, wrong: str) -> str:
        """The algorithms that have such an option, else the nearest one of this algorithm."""
        owners = [name for name, options in ALGORITHMS.items() if wrong in options.model_fields]
        return f"{wrong} is an option of {listed(owners)} only" if owners else super().remedy(wrong)


class IterativeOptions(Options):
    """What every algorithm takes that maximises an objective over θ.

    tolerance: relative change of the objective below which (strictly) a fit has converged; 0 never stops.
    init: `params` is the model's own values; `kmeans` and `random` are such responsibilities and one M-step.
    start_from: the fit whose final parameters are this one's start. freeze: parameters kept at their start.
    """

    max_steps: Count = 500
    tolerance: Annotated[float, Field(ge=0)] = 1e-8
    init: Literal["params", "kmeans", "random"] = "params"
    start_from: Name | None = None
    freeze: Names = ()


class GradientOptions(IterativeOptions):
    """What an algorithm takes whose every step is one of an optimizer.

    learning_rate: None is the optimizer's own, see `rate`. clip_norm: largest norm of the gradient, None for no limit.
    """

    optimizer: Optimizer = "lbfgs"
    learning_rate: Positive | None = None
    clip_norm: Positive | None = None

    @property
    def rate(self) -> float:
        """The learning rate in effect: as given, else 1 for L-BFGS and 0.01 for the others."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == "lbfgs" else 0.01


class VariationalOptions(GradientOptions):
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


class EnumerationOptions(ExactOptions, GradientOptions):
    """Gradient ascent on the exact log evidence."""

    algorithm: Literal["enumeration"] = "enumeration"


class EMOptions(ExactOptions):
    """Expectation maximisation. m_steps: updates of an M-step by gradient; a closed form counts as one.

    acceleration: `squarem` extrapolates every second update, where that does not lower the objective.
    """

    records: ClassVar[bool] = True
    algorithm: Literal["em"] = "em"
    m_steps: Count = 20
    acceleration: Literal["none", "squarem"] = "none"


class VEMOptions(VariationalOptions):
    """Variational EM: `e_steps` updates of λ, then `m_steps` of θ, in turn.

    e_step, m_step: `auto` is a closed form wherever there is one, `gradient` none. A sweep of closed forms over q's local
    sites counts as one update; its global sites have one a round.
    """

    records: ClassVar[bool] = True
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
