"""Our own folders, which hold every format and which stock transformers does not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.checkpoints.packed import STEM, roles
from qlora_compile.hf.quantizer import VERSION
from qlora_compile.hf.saving.folders.folder_format import FolderFormat
from qlora_compile.kernels.formats.formats import planes_of
from qlora_compile.kernels.packed import PackedWeight, as_bytes
from qlora_compile.modules.packed import LAYOUT


class PackedFolder(FolderFormat):
    """Our own folder; `hf/checkpoints/packed.py` describes its tensors."""

    name: ClassVar[str] = STEM
    stem: ClassVar[str] = STEM
    single: ClassVar[bool] = False
    reader: ClassVar[str] = "transformers after `import qlora_compile`"
    code: ClassVar[str] = f"import qlora_compile\n{FolderFormat.code}"

    def obstacle(self, weights: Mapping[str, PackedWeight]) -> str | None:
        return None

    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        planes = planes_of(packed.layout)
        for role, plane, tensor in zip(roles(planes), planes, packed.tensors, strict=True):
            yield f"{prefix}{role}", as_bytes(tensor.data.reshape(plane.shape))
        yield f"{prefix}{LAYOUT}", packed.layout.to_tensor()

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "version": VERSION}
