"""Merging in place into a packed weight: the earlier planes are kept, and restored by unmerging.

A merged weight stays packed and is rounded once more. The planes from before are kept until the
adapters are unmerged, so that unmerging gives back the same bytes; subtracting the adapters from
the rounded weight and rounding again would not. The environment variable QLORA_COMPILE_UNMERGE says
where they are kept: "memory" of the host, a folder, or "nothing" to subtract all the same.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.modules.packed import PackedModule
from qlora_compile.saving_errors import UnmergePlaceError

_MEMORY, _NOTHING = "memory", "nothing"


class MergedStaysPackedWarning(UserWarning):
    """Adapters are merged into packed weights, which costs accuracy."""


class _KeptFile:
    """Planes in a file in `folder`, which goes with the last reference to the object.

    Copies share the file; what is pickled holds the planes themselves.
    """

    def __init__(self, planes: dict[str, Tensor], folder: str) -> None:
        descriptor, self._path = tempfile.mkstemp(".safetensors", "qlora_compile-", folder)
        os.close(descriptor)
        weakref.finalize(self, Path(self._path).unlink, missing_ok=True)
        self._names = list(planes)
        save_file({name: plane.contiguous() for name, plane in planes.items()}, self._path)

    def read(self) -> dict[str, Tensor]:
        stored = load_file(self._path)
        return {name: stored[name] for name in self._names}

    def __deepcopy__(self, memo: Any) -> _KeptFile:
        return self

    def __reduce__(self) -> Any:
        return dict, (self.read(),)


class KeptBase:
    """The packed weight of `module` and its `bias`, as they are before adapters are merged.

    place: "memory", or a folder.

    Raises:
        UnmergePlaceError: the folder cannot be written.
    """

    def __init__(self, module: PackedModule, bias: Tensor | None, place: str) -> None:
        packed = module.packed
        # Merging makes new planes: those of a CPU are kept without a copy.
        planes = {name: plane.data.cpu() for name, plane in packed.planes.items()}
        try:
            self._planes = planes if place == _MEMORY else _KeptFile(planes, place)
        except (OSError, SafetensorError) as error:
            raise UnmergePlaceError(value=place, problem=str(error)) from error
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
        kept = self._planes.read() if isinstance(self._planes, _KeptFile) else self._planes
        planes = {name: plane.to(device) for name, plane in kept.items()}
        module.store(PackedWeight(Layout.parse(self._layout), planes))
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
            place = os.environ.get("QLORA_COMPILE_UNMERGE", _MEMORY)
            kept = None if before or place == _NOTHING else KeptBase(module, bias, place)
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
