"""QuantizedLinear: an nn.Linear whose frozen weight is stored packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.kernels.op import quantized_linear
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.packed import PackedModule


class QuantizedLinear(PackedModule, nn.Linear):
    """y [..., N] = x [..., K] @ dequantize(weight)ᵀ + bias; PackedModule stores weight [N, K]."""

    def __init__(
        self, packed: PackedWeight, bias: nn.Parameter | None, weight_dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.weight_dtype = weight_dtype
        self.bias = bias
        self.store(packed)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str,
        *,
        site: str = "weight",
        **options: Any,
    ) -> QuantizedLinear:
        """Pack the weight of `linear` and share its bias; options and errors are those of
        `QuantFormat.quantize`."""
        packed = format_named(format).quantize(linear.weight, site=site, **options)
        module = cls(packed, linear.bias, linear.weight.dtype)
        return module.train(linear.training)

    @property
    def packed_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def is_unpacked(self) -> bool:
        """Whether the body of `unpacked` or `repacked` runs."""
        return self.weight.is_floating_point()

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Make `weight` the decoded weight [N, K] of `weight_dtype` inside the context."""
        codes = self._parameters["weight"]
        assert codes is not None
        if codes.is_floating_point():
            yield
            return
        # `self.weight = ...` would put the Parameter on the meta device while PEFT loads an adapter
        # with low_cpu_mem_usage.
        self._parameters["weight"] = nn.Parameter(self.dequantize(), requires_grad=False)
        try:
            yield
        finally:
            self._parameters["weight"] = codes

    @contextmanager
    def repacked(self) -> Iterator[None]:
        """Do as `unpacked`, then pack the changed `weight`, unless the body raises."""
        nested = self.is_unpacked
        with self.unpacked():
            yield
            changed = self.weight.data
        if not nested:
            self.requantize(changed)

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [..., K] @ dequantize(weight)ᵀ + bias."""
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            # No transform of torch.func knows the op, and jvp's result would be wrong.
            return nn.functional.linear(x, self.dequantize(x.dtype), bias)
        return quantized_linear(x, self.tensors, bias, self.layout)
