"""Checkpoints of AWQ models, as AutoAWQ saves them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch

from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import (
    FLOATS,
    Settings,
    Source,
    StoredWeight,
    rescaling_error,
    stems,
)
from qlora_compile.hf.packings import awq


class AwqCheckpoint(Source):
    """A Linear NAME has "NAME.qweight", "NAME.scales" and, unless every zero point is 8,
    "NAME.qzeros". AutoAWQ divides the activations of some architectures by other "scales"."""

    method: ClassVar[str] = "awq"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        storage = awq.AwqStorage.read(settings)
        for stem in stems(folder, ".scales"):
            if not folder.tensors.keys() & {f"{stem}.qweight", f"{stem}.qzeros"}:
                raise rescaling_error(folder, f"{stem}.scales")
        int32 = (torch.int32,)
        for stem in stems(folder, ".qweight"):
            tensors = {"codes": f"{stem}.qweight", "scales": f"{stem}.scales"}
            columns, words = folder.check(tensors["codes"], dtypes=int32, shape=(None, None))
            groups = storage.groups(columns)
            folder.check(tensors["scales"], dtypes=FLOATS, shape=(groups, 8 * words))
            if settings.get("zero_point", True):
                tensors["zeros"] = f"{stem}.qzeros"
                folder.check(tensors["zeros"], dtypes=int32, shape=(groups, words))
            pack = partial(awq.packed, storage=storage)
            yield StoredWeight(f"{stem}.weight", tensors, (8 * words, columns), pack)
