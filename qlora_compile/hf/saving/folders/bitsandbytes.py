"""bitsandbytes' folders: NF4, FP4 and row-wise INT8, as transformers writes and reads them.

A 4-bit weight is stored as `weight` [ceil(N K / 2), 1], which holds the codes, `weight.absmax`,
`weight.quant_map`, with double quantisation `weight.nested_absmax` and `weight.nested_quant_map`,
and the rest as JSON in uint8 (bitsandbytes 0.50, `QuantState.as_dict`); an 8-bit weight as `weight`
[N, K], `SCB` [N] and `weight_format` (`Linear8bitLt`).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.saving.folders.folder_format import FolderFormat, named, of_experts
from qlora_compile.kernels.formats.codebook import CodebookFormat
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The formats that bitsandbytes' ops take."""


class BitsAndBytesFolder(FolderFormat):
    name: ClassVar[str] = "bitsandbytes"
    reader: ClassVar[str] = "transformers with bitsandbytes installed"

    def obstacle(self, weights: Mapping[str, PackedWeight]) -> str | None:
        kinds = {self._kind(packed.layout) for packed in weights.values()}
        if len(kinds) > 1:
            return f"its weights are stored in {len(kinds)} ways, and bitsandbytes has one"
        if None in kinds:
            return f"bitsandbytes does not store {next(iter(weights.values())).layout}"
        return of_experts(weights)

    @abstractmethod
    def _kind(self, layout: Layout) -> tuple[Any, ...] | None:
        """Return what all weights of a folder must share, or None if bitsandbytes lacks it."""

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "llm_int8_skip_modules": unpacked,
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
        }


class FourBitFolder(BitsAndBytesFolder):
    def _kind(self, layout: Layout) -> tuple[Any, ...] | None:
        if layout.format not in ("nf4", "fp4") or layout.named["block_size"] not in _BLOCK_SIZES:
            return None
        return layout.format, layout.named.get("double_quantize")

    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        planes, layout = packed.planes, packed.layout
        quant_format = format_named(layout.format)
        assert isinstance(quant_format, CodebookFormat)
        state: dict[str, Any] = {
            "quant_type": layout.format,
            "blocksize": layout.named["block_size"],
            "dtype": named(dtype),
            "shape": list(layout.shape),
        }
        yield f"{prefix}weight", planes["codes"].reshape(-1, 1)
        yield f"{prefix}weight.absmax", planes["absmax"].reshape(-1)
        codebook = quant_format.codebook_on(packed.codes.device)
        yield f"{prefix}weight.quant_map", codebook.clone()
        if layout.named.get("double_quantize"):
            yield f"{prefix}weight.nested_absmax", planes["nested_absmax"].reshape(-1)
            yield f"{prefix}weight.nested_quant_map", planes["nested_codebook"].reshape(-1)
            state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
            state["nested_offset"] = float(planes["nested_offset"])
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        yield f"{prefix}weight.quant_state.bitsandbytes__{layout.format}", text

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        layout = next(iter(weights.values())).layout
        return super().quantization_config(weights, unpacked, dtype) | {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": layout.format,
            "bnb_4bit_use_double_quant": bool(layout.named.get("double_quantize")),
            "bnb_4bit_compute_dtype": named(dtype),
            "bnb_4bit_quant_storage": "uint8",
        }


class EightBitFolder(BitsAndBytesFolder):
    def _kind(self, layout: Layout) -> tuple[Any, ...] | None:
        by_row = layout.format == "int8" and layout.named["block_size"] == layout.shape[1]
        return ("int8",) if by_row else None

    def tensors(
        self, prefix: str, packed: PackedWeight, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        yield f"{prefix}weight", packed.planes["codes"].reshape(packed.shape)
        yield f"{prefix}SCB", packed.planes["absmax"].reshape(-1)
        yield f"{prefix}weight_format", torch.tensor(0, dtype=torch.uint8)

    def quantization_config(
        self, weights: Mapping[str, PackedWeight], unpacked: list[str], dtype: torch.dtype
    ) -> dict[str, Any]:
        chosen = {"load_in_4bit": False, "load_in_8bit": True}
        return super().quantization_config(weights, unpacked, dtype) | chosen
