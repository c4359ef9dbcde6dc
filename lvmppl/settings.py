"""Options that are more than a number or a name: schedules, the estimator of a gradient, the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from lvmppl.strict import Count, Frozen, Name, Positive


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
