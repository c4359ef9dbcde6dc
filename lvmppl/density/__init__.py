"""A Pyro model (and guide) as factor functions: the one place that speaks to Pyro's effect handlers.

A model p(x, z; θ) is traced once to learn its structure (`discover`); after that `evaluate` maps (θ, rows) to
log-factors f_s with named axes: the name of each enumerated site and of each plate an axis belongs to. The exact
engine, EM, gradient ascent and the ELBO all work on these factors and never see a Pyro trace.

θ and λ are plain dictionaries of constrained tensors that are handed in; Pyro's parameter store is not used. Inside
the data plate a `pyro.param(name, init, event_dim=e)` is a table with a row per datum, of which the batch's rows are
returned (DESIGN: rows are handed in, indices never are).

Shapes: N rows of data, B rows of a batch; enumerated axes stand left of plate axes.
"""

from __future__ import annotations

from lvmppl.density.autoguides import build_guide, is_autoguide, spans_rows
from lvmppl.density.coordinates import Coordinates
from lvmppl.density.discovery import describe, discover, num_rows
from lvmppl.density.enumeration import MAX_TABLE
from lvmppl.density.factors import gaussian_chain_parts, with_densities, with_scales
from lvmppl.density.handlers import CheckValues, EnumeratedChain
from lvmppl.density.isolation import derive_seed, isolated, mixed, unvalidated
from lvmppl.density.joint import HeldJoint, Joint
from lvmppl.density.programs import Program, function_name
from lvmppl.density.states import check_states
from lvmppl.density.steps import check_steps
from lvmppl.density.structure import (
    PARTICLES,
    POINTS,
    Drawing,
    Evaluation,
    Factor,
    ParameterSpec,
    Rows,
    SiteInfo,
    SiteView,
    Structure,
    Values,
    Variable,
    chain_axes,
    time_axis,
)

__all__ = [
    "MAX_TABLE",
    "PARTICLES",
    "POINTS",
    "CheckValues",
    "Coordinates",
    "Drawing",
    "EnumeratedChain",
    "Evaluation",
    "Factor",
    "HeldJoint",
    "Joint",
    "ParameterSpec",
    "Program",
    "Rows",
    "SiteInfo",
    "SiteView",
    "Structure",
    "Values",
    "Variable",
    "build_guide",
    "chain_axes",
    "check_states",
    "check_steps",
    "derive_seed",
    "describe",
    "discover",
    "function_name",
    "gaussian_chain_parts",
    "is_autoguide",
    "isolated",
    "mixed",
    "num_rows",
    "spans_rows",
    "time_axis",
    "unvalidated",
    "with_densities",
    "with_scales",
]
