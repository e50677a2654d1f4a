"""PackedModule: base class of modules that store a frozen weight packed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_compile.errors import StoredLayoutError
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.formats import meta_tensors
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight, as_bytes
from qlora_compile.kernels.registry import format_named

LAYOUT = "packed_layout"
"""The name of the Parameter that stores the Layout, as `Layout.to_tensor` makes it."""


def _stored_layout(stored: Tensor) -> Layout:
    """Return the Layout in `stored`, of which each rank may hold a part."""
    return Layout.from_tensor(stored.full_tensor() if isinstance(stored, DTensor) else stored)


class PackedModule(nn.Module):
    """Holds one PackedWeight of shape `packed_shape`.

    All planes are frozen Parameters of integers: `weight` holds the codes, the others have their
    own names, floating-point planes are stored by their bytes (`as_bytes`), and a last Parameter
    holds the Layout. So all of them are sharded, gathered, moved and saved like any Parameter, and
    nothing casts them. `weight_dtype` is the dtype of the weight that was packed. `origin` says
    where the packed weight comes from, for reports.
    """

    weight: Any
    weight_dtype: torch.dtype
    origin: str = "quantised here"

    @property
    @abstractmethod
    def packed_shape(self) -> tuple[int, int]:
        """(rows, columns), as in `PackedWeight.shape`."""

    def store(self, packed: PackedWeight) -> None:
        """Make `packed` this module's weight: its planes and its Layout."""
        # Kept as text, which Dynamo reads as a constant.
        self.layout = str(packed.layout)
        _, *self.side_names = packed.planes
        planes = {"weight": packed.codes} | {n: packed.planes[n] for n in self.side_names}
        planes[LAYOUT] = packed.layout.to_tensor().to(packed.codes.device)
        for name, plane in planes.items():
            self.register_parameter(name, nn.Parameter(as_bytes(plane), requires_grad=False))

    @property
    def tensors(self) -> list[Tensor]:
        """The planes as they are stored, in the order of `PackedWeight.tensors`."""
        return [self.weight, *[getattr(self, name) for name in self.side_names]]

    @staticmethod
    def stored_elements(layout: Layout) -> int:
        """Return how many elements the Parameters of a weight of `layout` have together."""
        planes = meta_tensors(layout, torch.float32)
        return sum(as_bytes(plane).numel() for plane in planes) + layout.to_tensor().numel()

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

        Does nothing if `weight` equals the decoded present weight, which packing would round once
        more.
        """
        if torch.equal(weight, self.dequantize(weight.dtype)):
            return
        self.store(self.quant_format.pack(weight, Layout.parse(self.layout)))

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

        Raises StoredLayoutError, before any tensor changes, if the state dict's weight has another
        Layout. State dicts of older versions are accepted: they have no Layout, or floating-point
        planes in their own dtypes.
        """
        key = prefix + LAYOUT
        if key in state_dict and (stored := _stored_layout(state_dict[key])) != Layout.parse(
            self.layout
        ):
            raise StoredLayoutError(site=prefix.rstrip("."), value=stored, expected=self.layout)
        names = (prefix + name for name in self.side_names)
        older = {name: as_bytes(state_dict[name]) for name in names if name in state_dict}
        super()._load_from_state_dict(
            *({**state_dict, **older}, prefix, local_metadata, strict),
            *(missing_keys, unexpected_keys, error_msgs),
        )
        if key in missing_keys:
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        parameters = (f"{name}={value}" for name, value in Layout.parse(self.layout).parameters)
        return ", ".join([super().extra_repr(), f"format={self.format}", *parameters])
