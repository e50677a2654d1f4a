"""Checkpoints of NVIDIA's TensorRT Model Optimizer ("modelopt"): NVFP4, and FP8 per tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import (
    Settings,
    Source,
    StoredWeight,
    rescaling_error,
    stems,
)
from qlora_compile.hf.packings.fp4 import NV_GROUP, packed_nvfp4
from qlora_compile.hf.packings.fp8 import packed_fp8
from qlora_compile.kernels.packed import PackedWeight

_RESCALING = ".pre_quant_scale"


class ModelOptCheckpoint(Source):
    """NVFP4: "weight", uint8 [N, K / 2], "weight_scale", float8 [N, K / 16], "weight_scale_2",
    float32 []. FP8: "weight", float8 [N, K], "weight_scale", float32 []. AWQ multiplies the
    activations of a Linear by its "pre_quant_scale".
    """

    method: ClassVar[str] = "modelopt"
    beside: ClassVar[tuple[str, ...]] = (".input_scale", ".k_scale", ".v_scale")

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for stem in stems(folder, _RESCALING):
            raise rescaling_error(folder, f"{stem}{_RESCALING}")
        for stem in stems(folder, ".weight_scale"):
            name, scales = f"{stem}.weight", f"{stem}.weight_scale"
            n, width = folder.check(
                name, dtypes=(torch.uint8, torch.float8_e4m3fn), shape=(None, None)
            )
            tensors = {"weight": name, "scales": scales}
            if folder.tensors[name].dtype == torch.uint8:
                whole = f"{stem}.weight_scale_2"
                groups = -(-2 * width // NV_GROUP)
                folder.check(scales, dtypes=(torch.float8_e4m3fn,), shape=(n, groups))
                folder.check(whole, dtypes=(torch.float32,), shape=())
                tensors["global_scale"] = whole
                yield StoredWeight(name, tensors, (n, 2 * width), _packed_nvfp4)
            else:
                folder.check(scales, dtypes=(torch.float32,), shape=())
                yield StoredWeight(name, tensors, (n, width), _packed_fp8)


def _packed_nvfp4(tensors: Mapping[str, Tensor]) -> PackedWeight:
    return packed_nvfp4(tensors["weight"], tensors["scales"], tensors["global_scale"])


def _packed_fp8(tensors: Mapping[str, Tensor]) -> PackedWeight:
    return packed_fp8(tensors["weight"], tensors["scales"])
