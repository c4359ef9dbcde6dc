"""Guides that hold a continuous site at one value, as for a maximum a posteriori (MAP) estimate.

Such a q has no density, so there is no KL[q ‖ p(z | x)] and no ELBO: what a fit climbs is log p(x, z; θ) at the point z (a
density in z, on neither side of log p(x; θ)), or a lower bound of it where q spreads over other sites.
"""

from __future__ import annotations

import torch

from lvmppl.algorithms.problem import Problem


def point_sites(problem: Problem) -> tuple[str, ...]:
    """The continuous sites of the model that q holds at a point.

    A Delta may also carry a draw of an auxiliary site, as in Pyro's autoguides: its value then differs between draws.
    """
    assert problem.guided is not None and problem.guided.guide_structure is not None
    own, found = problem.guided.guide_structure.sites, problem.model.structure.sites
    held = [n for n, s in own.items() if s.family == "Delta" and n in found and not found[n].discrete]
    if not held or not any(s.auxiliary for s in own.values()):
        return tuple(held)
    data, rows = problem.rows()
    values = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            values.append(problem.guided.evaluate_guide(data, problem.initial, rows).samples)
    return tuple(n for n in held if torch.equal(values[0][n], values[1][n]))


def objective_kind(problem: Problem) -> str:
    """What a guided fit climbs: `elbo`, or `log_joint` where q holds a site at a point."""
    return "log_joint" if point_sites(problem) else "elbo"


def point_message(problem: Problem) -> str:
    """Why there is no ELBO, empty where there is one."""
    sites = point_sites(problem)
    if not sites:
        return ""
    plate, found = problem.data_plate, problem.model.structure.sites
    where = "" if any(plate in found[n].plates for n in sites) else "global "
    names = ", ".join(sites)
    return f"no ELBO: q is a point at the {where}site {names}; the objective is the log joint there"


__all__ = ["objective_kind", "point_message", "point_sites"]
