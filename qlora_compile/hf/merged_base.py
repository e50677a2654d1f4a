"""Merging in place into a packed weight: the earlier planes are kept, and restored by unmerging.

A merged weight stays packed and is rounded once more. The planes from before are kept in host
memory until the adapters are unmerged, so that unmerging gives back the same bytes; subtracting the
adapters from the rounded weight and rounding again would not.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.modules.packed import PackedModule


class MergedStaysPackedWarning(UserWarning):
    """Adapters are merged into packed weights, which costs accuracy."""


class KeptBase:
    """The packed weight of `module` and its `bias`, as they are before adapters are merged."""

    def __init__(self, module: PackedModule, bias: Tensor | None = None) -> None:
        packed = module.packed
        # Merging makes new planes: those of a CPU are kept without a copy.
        self._planes = {name: plane.data.cpu() for name, plane in packed.planes.items()}
        self._layout = module.layout
        self._bias = None if bias is None else bias.data.clone()
        self._merged: int | None = None

    def note_merged(self, module: PackedModule) -> None:
        """Remember the merged weight, to notice if something else replaces it."""
        self._merged = _state(module)

    def is_current(self, module: PackedModule) -> bool:
        """Whether the weight of `module` is the one that was merged."""
        return self._merged == _state(module)

    def give_back(self, module: Any, bias: Tensor | None = None) -> None:
        """Put the kept weight and bias back, on their present device."""
        device = module.weight.device
        planes = {name: plane.to(device) for name, plane in self._planes.items()}
        module._store(PackedWeight(Layout.parse(self._layout), planes))
        if bias is not None and self._bias is not None:
            bias.data.copy_(self._bias)


def _state(module: PackedModule) -> int:
    """Return a checksum of a packed weight, the same for copies of it."""
    checksum = 0
    for plane in module.tensors:
        stored = plane.data.cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(stored.numpy().data, checksum)
    return checksum


class MergesInPlace:
    """Mixin of adapter layers over a packed base: `merging` and `unmerging` surround PEFT's own."""

    _kept_base: KeptBase | None = None

    @contextmanager
    def merging(self: Any, module: PackedModule, bias: Tensor | None = None) -> Iterator[None]:
        """Keep the present weight before the body, which merges adapters and packs the result."""
        before = list(self.merged_adapters)
        kept = self._kept_base
        if kept is None or not before or not kept.is_current(module):
            kept = KeptBase(module, bias) if not before else None
        yield
        if self.merged_adapters != before:
            self._kept_base = kept
            if kept is not None:
                kept.note_merged(module)
            _warn(module)

    def taken_back(self: Any, module: PackedModule) -> KeptBase | None:
        """Return what `unmerge` may put back; None if nothing is kept, or for another weight."""
        kept = self._kept_base
        self._kept_base = None
        return kept if kept is not None and kept.is_current(module) else None


def _warn(module: PackedModule) -> None:
    label = module.quant_format.label(Layout.parse(module.layout))
    warnings.warn(
        f"adapters are merged into weights that stay packed ({label}), which rounds these once "
        "more; qlora_compile.merge(model, folder) writes them merged in 16 bits",
        MergedStaysPackedWarning,
        stacklevel=2,
    )
