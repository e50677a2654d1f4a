"""Our own folders, as `qlora_compile.save` writes them: every format, read bit for bit.

The codes of a weight `x.weight` are stored under that name, and every other plane as `x.PLANE`, in
the form in which the module holds it: floating-point numbers by their bytes. `x.packed_layout` is
the Layout, as `Layout.to_tensor` makes it. A weight of experts, `x.down_proj`, is stored in the
same way below `x.down_proj_packed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_compile.errors import QloraCompileError
from qlora_compile.hf.adapters import replace_base
from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight, stems
from qlora_compile.hf.conv1d import LinearSite, as_linear, features
from qlora_compile.hf.experts import is_transposed, settle
from qlora_compile.hf.quantizer import METHOD, VERSION
from qlora_compile.kernels.experts.base import PACKED_EXPERTS
from qlora_compile.kernels.formats.formats import format_named, meta_tensors, planes_of
from qlora_compile.kernels.layout import Layout, Plane
from qlora_compile.kernels.packed import PackedWeight, as_bytes
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.modules.packed import LAYOUT
from qlora_compile.saving_errors import PackedFolderVersionError

STEM = METHOD
"""The beginning of the files' names. Stock transformers, which would take the codes for numbers,
does not look for such files."""

ORIGIN = f"{STEM} checkpoint"


def roles(planes: Iterable[Plane]) -> list[str]:
    """Return the names of the tensors that store a weight, in the order of its planes."""
    return ["weight", *[plane.name for plane in planes][1:]]


class PackedCheckpoint(Source):
    method: ClassVar[str] = STEM
    stem: ClassVar[str] = STEM
    beside: ClassVar[tuple[str, ...]] = (f".{LAYOUT}",)

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        if (version := settings.get("version")) != VERSION:
            raise PackedFolderVersionError(folder=folder.path, value=version, known=VERSION)
        for name, layout in stored_layouts(folder):
            tensors = {role: f"{name}.{role}" for role in roles(planes_of(layout))}
            is_experts = name.endswith(PACKED_EXPERTS)
            own = name.removesuffix(PACKED_EXPERTS) if is_experts else f"{name}.weight"
            yield StoredWeight(own, tensors, layout.shape, _Pack(layout))


class _Pack:
    """Makes a PackedWeight of one Layout from the tensors by role."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __call__(self, tensors: Mapping[str, Tensor]) -> PackedWeight:
        return format_named(self._layout.format).packed(self._layout, list(tensors.values()))


def stored_layouts(folder: CheckpointFolder) -> Iterator[tuple[str, Layout]]:
    """Yield the Layout of every packed weight in a folder, with its module's name.

    Raises CheckpointError if a Layout cannot be read, or if a plane is missing or of another dtype
    or shape than its format declares.
    """
    for name in stems(folder, f".{LAYOUT}"):
        key = f"{name}.{LAYOUT}"
        folder.check(key, dtypes=(torch.uint8,), shape=(None,))
        try:
            layout = Layout.from_tensor(folder.read(key))
            planes = planes_of(layout)
        except (QloraCompileError, KeyError) as error:
            raise folder.error(key, f"it is not a Layout ({error})", AGAIN) from error
        stored = map(as_bytes, meta_tensors(layout, torch.float32))
        for plane, role in zip(stored, roles(planes), strict=True):
            folder.check(f"{name}.{role}", dtypes=(plane.dtype,), shape=tuple(plane.shape))
        yield name, layout


def prepare(model: nn.Module, folder: CheckpointFolder) -> None:
    """Give a skeleton on the meta device the packed modules of a `folder`, without data.

    Raises CheckpointError as `stored_layouts`, and if a weight belongs to no Linear and to no
    experts of the model.
    """
    modules = dict(model.named_modules())
    for name, layout in stored_layouts(folder):
        path, _, parameter = name.removesuffix(PACKED_EXPERTS).rpartition(".")
        is_experts = name.endswith(PACKED_EXPERTS)
        module: Any = modules.get(path if is_experts else name)
        weight: Any = getattr(module, parameter, None) if is_experts else None
        if isinstance(module, LinearSite) and features(module) == layout.shape:
            packed = place_linear(model, name, as_linear(module), layout)
        elif isinstance(weight, Tensor) and _shape(module, weight) == layout.shape:
            turned = is_transposed(module)
            packed = PackedExperts(_without_data(layout), weight.shape[0], turned, weight.dtype)
            delattr(module, parameter)
            settle(module, parameter, packed)
        else:
            problem = f"it stores a weight {list(layout.shape)}, but the model has none there"
            raise folder.error(f"{name}.weight", problem, f"{AGAIN}, and config.json")
        packed.origin = ORIGIN


def _shape(experts: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return (E * N, K) for a weight [E, N, K], or [E, K, N] if `experts` are transposed."""
    count, n, k = (1, *weight.shape)[-3:]
    n, k = (k, n) if is_transposed(experts) else (n, k)
    return count * n, k


def place_linear(model: nn.Module, name: str, linear: nn.Linear, layout: Layout) -> QuantizedLinear:
    """Replace a `linear` of a skeleton by a packed one without data, and return the new one."""
    module = QuantizedLinear(_without_data(layout), linear.bias, linear.weight.dtype)
    replace_base(model, name, module.train(linear.training))
    return module


def _without_data(layout: Layout) -> PackedWeight:
    return format_named(layout.format).packed(layout, meta_tensors(layout, torch.float32))
