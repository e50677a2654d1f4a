"""What the adopter of one library's quantised layers must tell and do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class Base(ABC):
    """One library's quantised Linears. Making and asking an adopter imports nothing of it, since
    the library is optional: its presence shows in the classes of the modules."""

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether `module` is a quantised Linear of this library, adopted or not."""

    @abstractmethod
    def format(self, module: Any) -> str | None:
        """The name of the format that a recognised `module` stores its weight in, adopted or not;
        None where it is not quantised yet."""

    @abstractmethod
    def obstacle(self, module: Any) -> str | None:
        """Why a recognised `module` cannot be adopted; None if it can."""

    @abstractmethod
    def adopt(self, module: Any) -> None:
        """Makes a `module` without an obstacle a site of the fused op, copying no weight."""

    @abstractmethod
    def adapter_layer(self, layer: nn.Module) -> type[nn.Module] | None:
        """The class of ours that stands for PEFT's adapter `layer` over an adopted base; None where
        `layer` is none of PEFT's for this library."""
