"""Base: the interface of an adopter of one library's quantised layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.modules.linear import QuantizedLinear


class Base(ABC):
    """Adopter of one library's quantised Linears: an InPlaceBase or a RepackedBase.

    The library is optional, so creating an adopter and calling `recognises` and `format` must not
    import it; they look at the names of the modules' classes.
    """

    library: ClassVar[str]
    """The library's name, as reports give it."""

    @property
    def origin(self) -> str:
        """Where the weights come from, for reports."""
        return f"{self.library} layer"

    @abstractmethod
    def recognises(self, module: nn.Module) -> bool:
        """Whether `module` is a quantised Linear of this library, adopted or not.

        It need not be an nn.Linear.
        """

    @abstractmethod
    def format(self, module: Any) -> str | None:
        """Return the name of the format of a recognised `module`'s weight, adopted or not.

        None if the weight is not quantised yet.
        """

    @abstractmethod
    def obstacle(self, module: Any) -> str | None:
        """Return why a recognised `module` cannot be adopted; None if it can."""

    def weight(self, module: Any) -> Tensor:
        """Return the tensor that holds the codes of a recognised `module`."""
        return module.weight


class InPlaceBase(Base):
    """Adopter that leaves a layer where it is, with its parameters and its state dict."""

    @abstractmethod
    def adopt(self, module: Any) -> None:
        """Make a `module` without an obstacle a site of the fused op; the weight is not copied."""

    @abstractmethod
    def adapter_layer(self, layer: nn.Module) -> type[nn.Module] | None:
        """Return our class to replace the class of PEFT's adapter `layer` over an adopted base.

        None if `layer` is not PEFT's adapter layer for this library.
        """


class RepackedBase(Base):
    """Adopter that puts a QuantizedLinear in a layer's place, before PEFT attaches adapters.

    Planes that the layer stores as a format of ours does share the layer's memory.
    """

    @abstractmethod
    def packed(self, module: Any) -> PackedWeight:
        """Return the weight [N, K] of a `module` without an obstacle; every value stays the same.

        Raises StoredWeightError if a value of its tensors cannot be read.
        """

    @abstractmethod
    def dtype(self, module: Any) -> torch.dtype:
        """Return the dtype that a recognised `module` computes in."""

    def bias(self, module: Any) -> nn.Parameter | None:
        """Return the bias, which some libraries keep as a buffer."""
        bias = module.bias
        if bias is None or isinstance(bias, nn.Parameter):
            return bias
        return nn.Parameter(bias, requires_grad=False)

    def finish(self, model: nn.Module) -> None:
        """Undo what the library did to `model` for its layers, which have all been replaced."""
        return

    def replacement(self, module: Any) -> QuantizedLinear:
        """Return the QuantizedLinear for a `module` without an obstacle.

        Raises StoredWeightError.
        """
        linear = QuantizedLinear(self.packed(module), self.bias(module), self.dtype(module))
        linear.origin = self.origin
        return linear.train(module.training)


def comes_from(module: nn.Module, package: str, name: str | None = None) -> bool:
    """Whether a class of `module` is from `package`, and has the `name` if one is given."""
    return any(
        cls.__module__.partition(".")[0] == package and name in (None, cls.__name__)
        for cls in type(module).__mro__
    )
