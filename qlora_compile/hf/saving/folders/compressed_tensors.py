"""compressed-tensors' pack-quantized folders: INT4 with integer zeros or none, in groups or by row.

A weight is stored as `weight_packed` int32 [N, K / 8], eight codes per word with the first in the
lowest bits, `weight_scale` [N, groups], `weight_shape` [2], and with zeros `weight_zero_point`
int32 [N / 8, groups], packed along N (compressed-tensors 0.20, `PackedQuantizationCompressor`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.saving.folders.folder_format import FolderFormat, of_experts
from qlora_compile.kernels.packed import PackedWeight

_CODES_PER_WORD = 8
_LARGEST_ZERO = 15
_PLANES = {"codes", "scales", "zeros"}
"""What the folder has a place for."""


class CompressedTensorsFolder(FolderFormat):
    name: ClassVar[str] = "compressed-tensors"
    reader: ClassVar[str] = "transformers with compressed-tensors installed, or vLLM"
    # transformers decodes into [N, K], whatever the shape of the parameter.
    turns_conv1d: ClassVar[bool] = False
    # compressed-tensors 0.20 has no place for packed zero points in a model that stays packed.
    code: ClassVar[str] = (
        "from transformers import CompressedTensorsConfig, {model}\n\n"
        "config = CompressedTensorsConfig(dequantize=True)\n"
        "model = {model}.from_pretrained(folder, quantization_config=config)"
    )

    def obstacle(self, weights: Mapping[str, PackedWeight]) -> str | None:
        kinds = set()
        for name, packed in weights.items():
            layout, options = packed.layout, packed.layout.named
            if layout.format != "int4" or options["zeros"] == "float":
                return f"{name} is {layout}, and not int4 with integer zeros or none"
            if lost := sorted(packed.planes.keys() - _PLANES):
                return f"{name} is {layout}, and there is no place for its {lost[0]}"
            if layout.shape[0] % _CODES_PER_WORD or layout.shape[1] % _CODES_PER_WORD:
                return f"{name} has sides {layout.shape} that are not multiples of 8"
            if layout.shape[1] % options["group_size"]:
                return f"{name}: {options['group_size']} columns a group do not divide its columns"
            # GPTQ's version 1 has zeros of 16, which would reach into the next row.
            if "zeros" in packed.planes and int(packed.planes["zeros"].max()) > _LARGEST_ZERO:
                return f"{name} has a zero above {_LARGEST_ZERO}, which four bits do not hold"
            kinds.add(options["zeros"])
        if len(kinds) > 1 or _strategy(weights) is None:
            return "its weights are stored in several ways, and a folder has one"
        return of_experts(weights)

    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        rows, columns = packed.shape
        codes = packed.codes.reshape(rows, columns // 2)
        yield f"{prefix}weight_packed", codes.contiguous().view(torch.int32)
        yield f"{prefix}weight_scale", packed.planes["scales"].reshape(rows, -1)
        yield f"{prefix}weight_shape", torch.tensor([rows, columns])
        if "zeros" in packed.planes:
            # Two rows to a byte, then four bytes to a word.
            zeros = packed.planes["zeros"].reshape(rows, -1).t()
            pairs = zeros[:, ::2] | zeros[:, 1::2] << 4
            # contiguous() keeps the strides of dimensions of length one, which view() refuses.
            words = pairs.clone(memory_format=torch.contiguous_format).view(torch.int32).t()
            yield f"{prefix}weight_zero_point", words.contiguous()

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        options = next(iter(weights.values())).layout.named
        strategy = _strategy(weights)
        stored = {
            "num_bits": 4,
            "type": "int",
            "symmetric": options["zeros"] == "none",
            "strategy": strategy,
            "group_size": options["group_size"] if strategy == "group" else None,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": stored}},
            "ignore": unpacked,
        }


def _strategy(weights: Mapping[str, PackedWeight]) -> str | None:
    """Return "group" if all groups have one size, "channel" if all are rows, else None."""
    layouts = [packed.layout for packed in weights.values()]
    if len({layout.named["group_size"] for layout in layouts}) == 1:
        return "group"
    by_row = all(layout.named["group_size"] == layout.shape[1] for layout in layouts)
    return "channel" if by_row else None
