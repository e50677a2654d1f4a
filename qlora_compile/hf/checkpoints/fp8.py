"""Checkpoints of fine-grained FP8, as DeepSeek-V3 (2024), Qwen3 and transformers write them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import FLOATS, Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings import fp8
from qlora_compile.hf.packings.fp4 import MX_GROUP, packed_mxfp4
from qlora_compile.kernels.packed import PackedWeight

_SCALES = ("_scale_inv", ".scale", ".qscale_weight")
"""How the names of scales end: "NAME.weight_scale_inv", "NAME.gate_up_proj_scale_inv" of experts in
one tensor, and DeepSeek-V4's and Mistral's "NAME.scale" and "NAME.qscale_weight"."""

_BYTES = (torch.float8_e8m0fnu, torch.uint8)
_CODES = (*fp8.FORMATS, torch.int8)


class Fp8Checkpoint(Source):
    """A packed weight is float8 [N, K], or [E, N, K], beside its scales.

    Scales form the grid of `weight_block_size`; without that setting there is one scale. Weights in
    int8, such as DeepSeek-V4's experts, are MXFP4, two to a byte; their scales are bytes e8m0.
    """

    method: ClassVar[str] = "fp8"
    beside: ClassVar[tuple[str, ...]] = (".activation_scale", ".input_scale")

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        block = _block(settings)
        for ending in _SCALES:
            for stem in stems(folder, ending):
                name = stem if ending == "_scale_inv" else f"{stem}.weight"
                if name in folder.tensors and folder.tensors[name].dtype not in _CODES:
                    continue  # a scale of something else, which is not a packed weight
                yield _weight(folder, name, stem + ending, block)


def _block(settings: Settings) -> tuple[int, int] | None:
    value: Any = settings.get("weight_block_size", (128, 128))
    if value is None:
        return None
    if not (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(size) is int and size > 0 for size in value)
    ):
        raise StoredWeightError(
            tensor="quantization_config",
            problem=f"weight_block_size is {value!r}, not two sizes",
            remedy="download config.json again",
        )
    return value[0], value[1]


def _weight(
    folder: CheckpointFolder, name: str, scales: str, block: tuple[int, int] | None
) -> StoredWeight:
    shape = folder.check(name, dtypes=_CODES)
    if len(shape) not in (2, 3):
        folder.check(name, shape=(None, None))
    tensors = {"weight": name, "scales": scales}
    *outer, n, k = shape
    if folder.tensors[name].dtype == torch.int8:
        folder.check(scales, dtypes=_BYTES, shape=(*outer, n, -(-2 * k // MX_GROUP)))
        return StoredWeight(
            name,
            tensors,
            (*outer, n, 2 * k),
            lambda read: packed_mxfp4(read["weight"], read["scales"]),
        )
    stored = folder.check(scales, dtypes=(*FLOATS, *_BYTES))
    if block is None:
        if len(stored) > len(outer):
            folder.check(scales, shape=(*outer, 1, 1))
    else:
        folder.check(scales, shape=(*outer, -(-n // block[0]), -(-k // block[1])))
    return StoredWeight(name, tensors, shape, partial(_packed, block))


def _packed(block: tuple[int, int] | None, tensors: Mapping[str, Tensor]) -> PackedWeight:
    scales = tensors["scales"]
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return fp8.packed_fp8(tensors["weight"], scales, block)
