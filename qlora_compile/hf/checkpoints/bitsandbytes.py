"""Checkpoints of bitsandbytes 4-bit and 8-bit models, as transformers saves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings import bitsandbytes
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE
from qlora_compile.kernels.packed import PackedWeight

_STATE = ".quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")


class BitsAndBytesCheckpoint(Source):
    """A 4-bit weight has "NAME.weight.quant_state.bitsandbytes__nf4" or "…__fp4" beside it, an
    8-bit one "NAME.SCB"."""

    method: ClassVar[str] = "bitsandbytes"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for kind in bitsandbytes.FORMATS_OF_4_BITS:
            for name in stems(folder, _STATE + kind):
                yield _weight_of_4_bits(folder, name, name + _STATE + kind)
        for stem in stems(folder, ".SCB"):
            name = f"{stem}.weight"
            rows, columns = folder.check(name, dtypes=(torch.int8,), shape=(None, None))
            folder.check(f"{stem}.SCB", dtypes=(torch.float32,), shape=(rows,))
            tensors = {"weight": name, "SCB": f"{stem}.SCB"}
            if (order := f"{stem}.weight_format") in folder.tensors:
                folder.check(order, dtypes=(torch.uint8,), shape=())
                tensors["weight_format"] = order
            yield StoredWeight(name, tensors, (rows, columns))

    def packed(
        self, weight: StoredWeight, tensors: Mapping[str, Tensor], settings: Settings
    ) -> PackedWeight:
        if "SCB" in tensors:
            return bitsandbytes.packed_8bit(tensors)
        return bitsandbytes.packed_4bit(bitsandbytes.State4bit.read(tensors["state"]), tensors)


def _weight_of_4_bits(folder: CheckpointFolder, name: str, state_name: str) -> StoredWeight:
    folder.check(state_name, dtypes=(torch.uint8,), shape=(None,))
    try:
        state = bitsandbytes.State4bit.read(folder.read(state_name))
    except StoredWeightError as error:
        problem, remedy = str(error.fields["problem"]), str(error.fields["remedy"])
        raise folder.error(state_name, problem, remedy) from error
    roles = ("absmax", "quant_map", *(_NESTED if state.offset is not None else ()))
    tensors = {"weight": name, "state": state_name} | {role: f"{name}.{role}" for role in roles}
    count = math.prod(state.shape)
    blocks = -(-count // state.block_size)
    nested = state.offset is not None
    stored = math.prod(folder.check(name)) * folder.tensors[name].dtype.itemsize
    if stored != -(-count // 2):
        problem = f"it has {stored} bytes, but its state says {state.shape[0]} x {state.shape[1]}"
        raise folder.error(name, f"{problem} weights of 4 bits", AGAIN)
    float32 = (torch.float32,)
    folder.check(tensors["absmax"], dtypes=(torch.uint8,) if nested else float32, shape=(blocks,))
    folder.check(tensors["quant_map"], dtypes=float32, shape=(16,))
    if nested:
        folder.check(tensors["nested_quant_map"], dtypes=float32, shape=(256,))
        outer = -(-blocks // NESTED_BLOCK_SIZE)
        folder.check(tensors["nested_absmax"], dtypes=float32, shape=(outer,))
    return StoredWeight(name, tensors, state.shape)
