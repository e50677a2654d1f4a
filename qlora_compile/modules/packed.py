"""PackedModule: a frozen weight that a module stores packed."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named

_BUFFERS = ("absmax", "nested_codebook", "nested_absmax", "nested_offset")


class PackedModule(nn.Module):
    """Holds one PackedWeight of shape `packed_shape`.

    `weight` holds the codes, a frozen Parameter of uint8 or int8; the other planes are buffers
    under their own names. `weight_dtype` is the dtype of the weight that was packed. Planes keep
    their dtype whatever the module is cast to.
    """

    weight_dtype: torch.dtype
    absmax: Tensor
    nested_codebook: Tensor | None
    nested_absmax: Tensor
    nested_offset: Tensor

    @property
    @abstractmethod
    def packed_shape(self) -> tuple[int, int]:
        """Rows and columns, as `PackedWeight.shape`."""

    def _store(self, packed: PackedWeight) -> None:
        self.format, self.block_size = packed.format, packed.block_size
        # As text, which Dynamo reads as a constant.
        self.layout = str(packed.layout)
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
        return PackedWeight.from_planes(
            self.format, self.packed_shape, self.block_size, self.planes
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [rows, columns], in `weight_dtype` unless told otherwise."""
        return format_named(self.format).dequantize(self.packed, dtype or self.weight_dtype)

    def requantize(self, weight: Tensor) -> None:
        """Replaces the weight by `weight` [rows, columns], packed as the present one is.

        A weight that is what the present one decodes to changes nothing: packing what was decoded
        would round the absmax anew.
        """
        if torch.equal(weight, self.dequantize(weight.dtype)):
            return
        packed = self.packed
        block_size = "row" if packed.block_size == packed.shape[1] else packed.block_size
        self._store(
            format_named(self.format).quantize(
                weight, block_size=block_size, double_quantize=packed.double_quantized
            )
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
