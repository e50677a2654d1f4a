"""QuantizedLinear: an nn.Linear whose frozen weight is stored packed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from qlora_compile.kernels.op import quantized_linear
from qlora_compile.kernels.registry import format_named
from qlora_compile.packed import PackedWeight

_BUFFERS = ("absmax", "nested_codebook", "nested_absmax", "nested_offset")


class QuantizedLinear(nn.Linear):
    """y [..., N] = x [..., K] @ dequantize(weight)ᵀ + bias.

    `weight` holds the codes, a frozen Parameter of uint8 or int8; the other planes of the
    PackedWeight are buffers under their own names. `weight_dtype` is the dtype of the weight that
    was packed. Planes keep their dtype whatever the module is cast to.
    """

    weight_dtype: torch.dtype
    absmax: Tensor
    nested_codebook: Tensor | None
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(
        self, packed: PackedWeight, bias: nn.Parameter | None, weight_dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.weight_dtype = weight_dtype
        self.bias = bias
        self._store(packed)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: str,
        *,
        block_size: int | Literal["row"] = 64,
        double_quantize: bool = False,
        site: str = "weight",
    ) -> QuantizedLinear:
        """Packs `linear`'s weight and shares its bias; raises as `QuantFormat.quantize`."""
        packed = format_named(format).quantize(
            linear.weight, block_size=block_size, double_quantize=double_quantize, site=site
        )
        module = cls(packed, linear.bias, linear.weight.dtype)
        return module.train(linear.training)

    def _store(self, packed: PackedWeight) -> None:
        self.format, self.block_size = packed.format, packed.block_size
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        for name, plane in zip(_BUFFERS, (*packed.planes[1:], None, None, None), strict=False):
            self.register_buffer(name, plane)

    @property
    def planes(self) -> list[Tensor]:
        """As `PackedWeight.planes`."""
        planes = [self.weight, self.absmax]
        if self.nested_codebook is not None:
            planes += [self.nested_codebook, self.nested_absmax, self.nested_offset]
        return planes

    @property
    def packed(self) -> PackedWeight:
        shape = (self.out_features, self.in_features)
        return PackedWeight.from_planes(self.format, shape, self.block_size, self.planes)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], in `weight_dtype` unless told otherwise."""
        return format_named(self.format).dequantize(self.packed, dtype or self.weight_dtype)

    def requantize(self, weight: Tensor) -> None:
        """Replaces the weight by `weight` [N, K], packed as the present one is."""
        packed = self.packed
        block_size = "row" if packed.block_size == self.in_features else packed.block_size
        self._store(
            format_named(self.format).quantize(
                weight, block_size=block_size, double_quantize=packed.double_quantized
            )
        )

    def forward(self, input: Tensor) -> Tensor:
        return quantized_linear(
            input,
            self.planes,
            self.bias,
            format=self.format,
            shape=(self.out_features, self.in_features),
            block_size=self.block_size,
        )

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, plane in before.items():
            moved = self._buffers[name]
            if plane is not None and moved is not None and moved.dtype != plane.dtype:
                self._buffers[name] = plane.to(moved.device)
        return self

    def extra_repr(self) -> str:
        double = ", double_quantized" if self.nested_codebook is not None else ""
        return f"{super().extra_repr()}, format={self.format}, block_size={self.block_size}{double}"
