"""Between constrained parameter values and the unconstrained ones that gradient steps move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributions import transform_to

from lvmppl.density.structure import ParameterSpec, Values


class Coordinates:
    """Between constrained values and the unconstrained ones that gradient steps move."""

    def __init__(self, specs: Mapping[str, ParameterSpec], names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.transforms = {name: transform_to(specs[name].constraint) for name in self.names}

    def unconstrain(self, values: Values) -> dict[str, Tensor]:
        return {name: self.transforms[name].inv(values[name]).detach().clone() for name in self.names}

    def constrain(self, unconstrained: Values) -> dict[str, Tensor]:
        return {name: self.transforms[name](unconstrained[name]) for name in self.names}
