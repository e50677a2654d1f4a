"""Base: the interface of an adopter of one library's quantised layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Base(ABC):
    """Adopter of one library's quantised Linears.

    The library is optional, so creating an adopter and calling `recognises` and `format` must not
    import it: they look at the classes of the modules.
    """

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether `module` is a quantised Linear of this library, adopted or not."""

    @abstractmethod
    def format(self, module: Any) -> str | None:
        """Return the name of the format of a recognised `module`'s weight, adopted or not.

        None if the weight is not quantised yet.
        """

    @abstractmethod
    def obstacle(self, module: Any) -> str | None:
        """Return why a recognised `module` cannot be adopted; None if it can."""

    @abstractmethod
    def adopt(self, module: Any) -> None:
        """Make a `module` without an obstacle a site of the fused op; the weight is not copied."""

    @abstractmethod
    def adapter_layer(self, layer: nn.Module) -> type[nn.Module] | None:
        """Return our class to replace the class of PEFT's adapter `layer` over an adopted base.

        None if `layer` is no adapter layer of PEFT's for this library.
        """
