"""PackedModule: base class of modules that store a frozen weight packed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.errors import StoredLayoutError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named

LAYOUT = "packed_layout"
"""The name of the buffer that stores the Layout in a state dict, as `Layout.to_tensor` makes it."""


class PackedModule(nn.Module):
    """Holds one PackedWeight of shape `packed_shape`.

    `weight` is a frozen Parameter of integers, the codes. The other planes are buffers under their
    own names, and the Layout is a buffer too. `weight_dtype` is the dtype of the weight that was
    packed. Planes keep their dtypes when the module is cast. `origin` says where the packed weight
    comes from, for reports.
    """

    weight_dtype: torch.dtype
    origin: str = "quantised here"

    @property
    @abstractmethod
    def packed_shape(self) -> tuple[int, int]:
        """(rows, columns), as in `PackedWeight.shape`."""

    def _store(self, packed: PackedWeight) -> None:
        # Kept as text, which Dynamo reads as a constant.
        self.layout = str(packed.layout)
        codes, *self.side_names = packed.planes
        self.weight = nn.Parameter(packed.planes[codes], requires_grad=False)
        for name in self.side_names:
            self.register_buffer(name, packed.planes[name])
        self.register_buffer(LAYOUT, packed.layout.to_tensor().to(self.weight.device))

    @property
    def tensors(self) -> list[Tensor]:
        """The planes, in the order of `PackedWeight.tensors`."""
        return [self.weight, *[getattr(self, name) for name in self.side_names]]

    @property
    def quant_format(self) -> QuantFormat:
        return format_named(self.format)

    @property
    def format(self) -> str:
        """The name of the format that the weight is stored in."""
        return Layout.parse(self.layout).format

    @property
    def packed(self) -> PackedWeight:
        return self.quant_format.packed(Layout.parse(self.layout), self.tensors)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight [rows, columns]; `dtype` None means `weight_dtype`."""
        return self.quant_format.dequantize(self.packed, dtype or self.weight_dtype)

    def requantize(self, weight: Tensor) -> None:
        """Replace the weight by `weight` [rows, columns], packed in the present Layout.

        Does nothing if `weight` equals what the present one decodes to: packing a decoded weight
        would round once more.
        """
        if torch.equal(weight, self.dequantize(weight.dtype)):
            return
        self._store(self.quant_format.pack(weight, Layout.parse(self.layout)))

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, plane in before.items():
            moved = self._buffers[name]
            if plane is not None and moved is not None and moved.dtype != plane.dtype:
                self._buffers[name] = plane.to(moved.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load this module's tensors.

        Raises StoredLayoutError, before any of them changes, if the state dict's weight has another
        Layout. State dicts of older versions have no Layout, and none is missed.
        """
        key = prefix + LAYOUT
        if key in state_dict and (stored := Layout.from_tensor(state_dict[key])) != Layout.parse(
            self.layout
        ):
            raise StoredLayoutError(site=prefix.rstrip("."), value=stored, expected=self.layout)
        super()._load_from_state_dict(
            *(state_dict, prefix, local_metadata, strict),
            *(missing_keys, unexpected_keys, error_msgs),
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        parameters = (f"{name}={value}" for name, value in Layout.parse(self.layout).parameters)
        return ", ".join([super().extra_repr(), f"format={self.format}", *parameters])
