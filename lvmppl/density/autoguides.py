"""Guides that are built from their model, as Pyro's autoguides are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch import Tensor

from lvmppl.density.handlers import Parameters
from lvmppl.density.programs import as_model_error
from lvmppl.density.structure import Rows, Structure
from lvmppl.errors import InputError, ModelError


def build_guide(
    factory: Callable[..., Any], model: Callable[..., Any], structure: Structure, **args: Any
) -> Callable[..., Any]:
    """Build a guide that takes a parameter `model` (Pyro's autoguide convention).

    Autoguides are blind to enumerated sites, which are summed exactly, and get `create_plates` so that the data plate
    takes the size of the rows handed in.
    """
    build: Any = factory
    if isinstance(factory, type) and issubclass(factory, AutoGuide):
        if not any(s.kind == "latent" for s in structure.sites.values()):
            raise ModelError(
                f"guide {factory.__name__}",
                "a model with continuous latent sites",
                f"only enumerated ones ({', '.join(structure.enumerated)})",
                "use a guide over them, such as `categorical`",
            )
        blind: Any = factory
        autoguide: Any = blind(_prototype(model, structure), **args)
        if getattr(autoguide, "create_plates", None) is None:  # not every one takes it in its constructor
            autoguide.create_plates = _data_plates(structure)
        result: Callable[..., Any] = autoguide
        return result
    try:
        guide: Callable[..., Any] = build(model, **args)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise as_model_error("guide", factory, error) from error
    take = getattr(guide, "use_structure", None)
    if take is not None:
        take(structure)
    return guide


def is_autoguide(guide: Callable[..., Any]) -> bool:
    """Whether a guide is one of Pyro's own, whose parameters take the size of the rows it is built on."""
    return isinstance(guide, AutoGuide)


def spans_rows(guide: Callable[..., Any], structure: Structure) -> bool:
    """Whether a guide has one distribution over the latents of all rows, so that its λ is that of these rows only."""
    local = any(s.kind == "latent" and structure.data_plate in s.plates for s in structure.sites.values())
    return local and isinstance(guide, AutoContinuous)


def _prototype(model: Callable[..., Any], structure: Structure) -> Callable[..., Any]:
    """The model as an autoguide looks at it: without enumerated sites, its parameters at their start.

    An autoguide is a module with parameters of its own, and refuses those that the model states inside it.
    """
    start = {name: spec.initial for name, spec in structure.parameters.items()}

    def prototype(**data: Tensor) -> None:
        with Parameters(start, structure.parameters, Rows(structure.num_rows), structure.data_plate):
            poutine.block(model, hide=list(structure.enumerated))(**data)

    return prototype


def _data_plates(structure: Structure) -> Callable[..., list[Any]]:
    plate = structure.data_plate

    def create_plates(**data: Tensor) -> list[Any]:
        if plate is None:
            return []
        return [pyro.plate(plate, len(next(iter(data.values()))), dim=structure.plate_axes[plate])]

    return create_plates
