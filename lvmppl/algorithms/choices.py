"""Which estimator each site of a guide gets: what the options ask for, checked against the table, or the sound default."""

from __future__ import annotations

from dataclasses import dataclass, field

from lvmppl.algorithms.integrated import IntegratedJoint
from lvmppl.algorithms.points import point_sites
from lvmppl.algorithms.problem import Problem
from lvmppl.density import SiteInfo
from lvmppl.errors import InputError
from lvmppl.estimators import ESTIMATORS, check_estimator, default_estimator
from lvmppl.options import VariationalOptions
from lvmppl.settings import Annealing, SiteEstimator, Temperature


@dataclass(frozen=True)
class Choice:
    """The estimator of one site; baseline of a score function, temperature of a relaxed state."""

    site: str
    kind: str
    estimator: str
    baseline: str = ""
    temperature: Temperature = field(default_factory=Temperature)

    @property
    def drawn(self) -> bool:
        return self.estimator not in ("enumeration", "integration") and self.kind != "point"

    @property
    def relaxed(self) -> bool:
        return self.estimator in ("gumbel_softmax", "straight_through")

    def __str__(self) -> str:
        baseline = f" ({self.baseline.replace('_', ' ')} baseline)" if self.baseline else ""
        return f"{self.site}: {self.estimator}{baseline}"


def site_kind(site: SiteInfo) -> str:
    """What a site of a guide is, in the words of the table of estimators."""
    relaxable = {"Bernoulli": "binary", "OneHotCategorical": "one_hot"}
    if site.family == "Delta":
        return "point"
    if site.kind == "enumerated":
        return "chain" if site.family == "MarkovChain" else relaxable.get(site.family, "finite")
    if site.reparameterised:
        return "reparameterised"
    return "vector" if site.family in relaxable else "drawn"


def choose(problem: Problem, options: VariationalOptions) -> tuple[Choice, ...]:
    """The estimator of every site of the guide, in its order.

    One estimator for the whole fit holds for the sites that it serves, the others keep their default.

    Raises:
        InputError: an estimator that does not serve its site, no site at all, or does not go with the objective; a
            site that the guide does not have; the message says why.
    """
    assert problem.guided is not None and problem.guided.guide_structure is not None
    sites, where = problem.guided.guide_structure.sites, f"fit '{problem.name}': estimator"
    if isinstance(options.estimator, dict):
        unknown = [n for n in options.estimator if n not in sites]
        if unknown:
            raise InputError(where, f"sites of the guide ({', '.join(sites)})", ", ".join(unknown))
    kinds = {name: site_kind(site) for name, site in sites.items()}
    one = options.site_estimator("") if not isinstance(options.estimator, dict) else None
    if one is not None and one.use != "auto":
        served = [n for n, kind in kinds.items() if kind in ESTIMATORS[one.use].serves]
        if not served and kinds:
            name, kind = next(iter(kinds.items()))
            check_estimator(one.use, kind, f"{where} of site '{name}'")
    _check_objective(problem, options)
    found = []
    for name, kind in kinds.items():
        asked = one if one is not None else options.site_estimator(name)
        if one is not None and one.use != "auto" and kind not in ESTIMATORS[one.use].serves:
            asked = SiteEstimator()
        if isinstance(problem.guided, IntegratedJoint) and kind not in (
            "binary",
            "one_hot",
            "finite",
            "chain",
        ):
            found.append(Choice(name, kind, "integration"))
        else:
            found.append(_choice(name, kind, asked, problem, options))
    return tuple(found)


def _choice(
    name: str, kind: str, asked: SiteEstimator, problem: Problem, options: VariationalOptions
) -> Choice:
    where = f"fit '{problem.name}': estimator of site '{name}'"
    use = default_estimator(kind) if asked.use == "auto" else asked.use
    check_estimator(use, kind, where)
    choice = Choice(name, kind, use, temperature=asked.temperature)
    if choice.relaxed and options.num_samples is not None:
        fix = "use score_function, or objective: elbo"
        raise InputError(
            where,
            "with objective importance_weighted an estimator whose draws have a density",
            f"{use}, whose relaxed states have none under q",
            fix,
        )
    if use != "score_function":
        return choice
    several = (options.num_samples or options.num_particles) > 1
    baseline = asked.baseline
    if baseline == "auto":
        baseline = "leave_one_out" if several else "running_mean"
    if baseline == "leave_one_out" and not several:
        many = "num_particles" if options.num_samples is None else "num_samples"
        raise InputError(
            where, f"for leave_one_out at least 2 {many}", "1", f"raise {many}, or take running_mean"
        )
    return Choice(name, kind, use, baseline)


def drawn_outside(problem: Problem, choices: tuple[Choice, ...]) -> tuple[str, ...]:
    """Drawn sites outside the data plate: they tie all rows together."""
    assert problem.guided is not None and problem.guided.guide_structure is not None
    sites = problem.guided.guide_structure.sites
    return tuple(c.site for c in choices if c.drawn and problem.data_plate not in sites[c.site].plates)


def _check_objective(problem: Problem, options: VariationalOptions) -> None:
    """What an importance-weighted bound does not go with."""
    if options.num_samples is None:
        return
    where = f"fit '{problem.name}': objective importance_weighted"
    if isinstance(options.kl_weight, Annealing) or options.kl_weight != 1.0 or options.free_bits:
        got = "free_bits" if options.free_bits else "kl_weight"
        raise InputError(where, "no weight on a KL: the bound has none", got, "use objective: elbo")
    held = point_sites(problem)
    if held:
        raise InputError(
            where, "a guide with a density", f"a point at {', '.join(held)}, which has none", "use elbo"
        )
    assert problem.guided is not None and problem.guided.guide_structure is not None
    sites = problem.guided.guide_structure.sites.values()
    outside = [s.name for s in sites if s.kind == "latent" and problem.data_plate not in s.plates]
    if outside:
        check_all_rows(problem, options, f"{', '.join(outside)} is drawn for all of them together")


def check_all_rows(problem: Problem, options: VariationalOptions, why: str) -> None:
    """Raises InputError where an importance-weighted bound is that of all rows together and a step has some of them."""
    if options.batch_size is None and not options.validation_fraction:
        return
    raise InputError(
        f"fit '{problem.name}': objective importance_weighted",
        f"all rows at every step, because {why}",
        "batch_size" if options.batch_size is not None else "validation_fraction",
        "leave it out, or use objective: elbo",
    )
