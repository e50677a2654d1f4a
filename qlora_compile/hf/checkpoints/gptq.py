"""Checkpoints of GPTQ models, as AutoGPTQ and GPTQModel save them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch

from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import FLOATS, Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings import gptq


class GptqCheckpoint(Source):
    """A Linear NAME has "NAME.qweight", "NAME.qzeros", "NAME.scales" and, in most checkpoints and
    in all with act-order (`desc_act`), "NAME.g_idx"."""

    method: ClassVar[str] = "gptq"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        storage = gptq.GptqStorage.read(settings)
        int32 = (torch.int32,)
        for stem in stems(folder, ".qweight"):
            names = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}
            if settings.get("desc_act") or f"{stem}.g_idx" in folder.tensors:
                names["index"] = "g_idx"
            tensors = {role: f"{stem}.{name}" for role, name in names.items()}
            words, rows = folder.check(tensors["codes"], dtypes=int32, shape=(None, None))
            if words * 32 % storage.bits:
                problem = f"{words} words do not hold a whole number of {storage.bits}-bit codes"
                raise folder.error(tensors["codes"], problem, f"{AGAIN}, and config.json")
            columns = words * 32 // storage.bits
            groups = storage.groups(columns)
            folder.check(tensors["scales"], dtypes=FLOATS, shape=(groups, rows))
            packed_rows = -(-rows * storage.bits // 32)
            folder.check(tensors["zeros"], dtypes=int32, shape=(groups, packed_rows))
            if "index" in tensors:
                folder.check(tensors["index"], dtypes=int32, shape=(columns,))
            pack = partial(gptq.packed, storage=storage)
            yield StoredWeight(f"{stem}.weight", tensors, (rows, columns), pack)
