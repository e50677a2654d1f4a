"""Checkpoints with experts in MXFP4, as OpenAI's gpt-oss (2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings.fp4 import MX_GROUP, packed_mxfp4
from qlora_compile.kernels.packed import PackedWeight


class Mxfp4Checkpoint(Source):
    """The weights of all experts of a layer are "NAME_blocks", uint8 [E, N, K / 32, 16], and
    "NAME_scales", uint8 [E, N, K / 32]."""

    method: ClassVar[str] = "mxfp4"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for name in stems(folder, "_blocks"):
            tensors = {"blocks": f"{name}_blocks", "scales": f"{name}_scales"}
            shape = (None, None, None, MX_GROUP // 2)
            experts, n, groups, _ = folder.check(
                tensors["blocks"], dtypes=(torch.uint8,), shape=shape
            )
            folder.check(tensors["scales"], dtypes=(torch.uint8,), shape=(experts, n, groups))
            yield StoredWeight(name, tensors, (experts, n, groups * MX_GROUP), _packed)


def _packed(tensors: Mapping[str, Tensor]) -> PackedWeight:
    return packed_mxfp4(tensors["blocks"], tensors["scales"])
