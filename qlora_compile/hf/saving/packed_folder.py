"""Our own folder of a packed model: planes and Layouts in safetensors, read back bit for bit.

The index has a name that stock transformers does not look for, so that a process without
qlora_compile raises an OSError: it would else take the codes for numbers. `config.json` has
`quant_method: "qlora_compile"`. A weight `x.weight` is stored as its codes under that name, the
other planes as `x.<plane>`, and its Layout, `Layout.to_tensor`, as `x.packed_layout`; a weight of
experts `x.down_proj` in the same way below `x.down_proj_packed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qlora_compile.hf.adapters import replace_base
from qlora_compile.hf.conv1d import LinearSite, as_linear, features
from qlora_compile.hf.experts import is_transposed, replace
from qlora_compile.hf.saving.folder_format import FolderFormat
from qlora_compile.kernels.experts.base import PACKED_EXPERTS
from qlora_compile.kernels.formats.formats import meta_tensors
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.experts import PackedExperts
from qlora_compile.modules.linear import QuantizedLinear
from qlora_compile.modules.packed import LAYOUT, PackedModule
from qlora_compile.saving_errors import PackedFolderError

STEM = "qlora_compile"
INDEX = f"{STEM}.safetensors.index.json"
VERSION = 1


class PackedFolder(FolderFormat):
    """Our own, which holds every format."""

    name: ClassVar[str] = "qlora_compile"
    stem: ClassVar[str] = STEM
    single: ClassVar[bool] = False
    reader: ClassVar[str] = "transformers after `import qlora_compile`"
    code: ClassVar[str] = f"import qlora_compile\n{FolderFormat.code}"

    def obstacle(self, weights: Mapping[str, PackedWeight]) -> str | None:
        return None

    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        names = ["weight", *list(packed.planes)[1:]]
        for name, plane in zip(names, packed.tensors, strict=True):
            yield f"{prefix}{name}", plane.data
        yield f"{prefix}{LAYOUT}", packed.layout.to_tensor()

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "version": VERSION}


def stored_layouts(files: Iterable[str | Path]) -> Iterator[tuple[str, Layout]]:
    """Yield the Layout of every packed weight in safetensors files, with its module's name.

    Raises:
        LayoutVersionError, LayoutTextError: a Layout cannot be read.
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name, _, leaf = key.rpartition(".")
                if leaf == LAYOUT:
                    yield name, Layout.from_tensor(opened.get_tensor(key))


def prepare(model: nn.Module, files: Iterable[str | Path]) -> None:
    """Give a `model` on the meta device packed modules of the Layouts in `files`, without data.

    Raises:
        PackedFolderError: a weight belongs to no Linear and to no experts of the model.
    """
    for name, layout in stored_layouts(files):
        if name.endswith(PACKED_EXPERTS):
            path, _, parameter = name.removesuffix(PACKED_EXPERTS).rpartition(".")
            _place_experts(_module(model, path, name), parameter, _without_data(layout))
            continue
        linear = _module(model, name, name)
        if not isinstance(linear, LinearSite) or features(linear) != layout.shape:
            raise _mismatch(name, f"{type(linear).__name__}, not a Linear of {layout.shape}")
        place_linear(model, name, as_linear(linear), layout)


def place_linear(model: nn.Module, name: str, linear: nn.Linear, layout: Layout) -> None:
    """Replace a `linear` of a skeleton by a packed one without data."""
    module = QuantizedLinear(_without_data(layout), linear.bias, linear.weight.dtype)
    replace_base(model, name, module.train(linear.training))


def _without_data(layout: Layout) -> PackedWeight:
    """Return a weight of `layout` on the meta device."""
    return format_named(layout.format).packed(layout, meta_tensors(layout, torch.float32))


def _place_experts(experts: nn.Module, parameter: str, packed: PackedWeight) -> None:
    weight = experts._parameters.get(parameter)
    turned = is_transposed(experts)
    if weight is None or weight.dim() != 3 or weight.numel() != packed.shape[0] * packed.shape[1]:
        found = None if weight is None else list(weight.shape)
        raise _mismatch(parameter, f"{type(experts).__name__} with a weight {found}")
    replace(experts, parameter, PackedExperts(packed, weight.shape[0], turned, weight.dtype))


def check(model: nn.Module) -> None:
    """Check dtypes and sizes of all planes of a model that has been loaded.

    Raises:
        PackedWeightError: a plane is not what its format declares.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.quant_format.check_format(module.packed)


def _module(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _mismatch(name, f"a {type(model).__name__} without such a module") from error


def _mismatch(name: str, found: str) -> PackedFolderError:
    return PackedFolderError(file=INDEX, problem=f"{name} is packed, and the model has {found}")
