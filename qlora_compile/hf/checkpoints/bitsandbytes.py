"""Checkpoints of bitsandbytes 4-bit and 8-bit models, as transformers saves them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import ClassVar

import torch

from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import Settings, Source, StoredWeight, named, stems
from qlora_compile.hf.packings import bitsandbytes
from qlora_compile.hf.packings.bitsandbytes import FORMATS_OF_4_BITS
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE

_STATE = ".quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")


class BitsAndBytesCheckpoint(Source):
    """A 4-bit weight has a tensor "NAME.weight.quant_state.bitsandbytes__nf4" or "…__fp4" beside
    it, an 8-bit weight has "NAME.SCB"."""

    method: ClassVar[str] = "bitsandbytes"
    beside: ClassVar[tuple[str, ...]] = tuple(_STATE + kind for kind in FORMATS_OF_4_BITS)

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for kind in FORMATS_OF_4_BITS:
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
            yield StoredWeight(name, tensors, (rows, columns), bitsandbytes.packed_8bit)


def _weight_of_4_bits(folder: CheckpointFolder, name: str, state_name: str) -> StoredWeight:
    folder.check(state_name, dtypes=(torch.uint8,), shape=(None,))
    with named(folder, {"state": state_name}):
        state = bitsandbytes.State4bit.read(folder.read(state_name))
    roles = ("absmax", "quant_map", *(_NESTED if state.offset is not None else ()))
    tensors = {"weight": name} | {role: f"{name}.{role}" for role in roles}
    count = math.prod(state.shape)
    blocks = -(-count // state.block_size)
    nested = state.offset is not None
    stored = math.prod(folder.check(name)) * folder.tensors[name].dtype.itemsize
    if stored != -(-count // 2):
        problem = f"it has {stored} bytes, but its state says {state.shape[0]} x {state.shape[1]}"
        raise folder.error(name, f"{problem} 4-bit weights", AGAIN)
    float32 = (torch.float32,)
    folder.check(tensors["absmax"], dtypes=(torch.uint8,) if nested else float32, shape=(blocks,))
    folder.check(tensors["quant_map"], dtypes=float32, shape=(16,))
    if nested:
        folder.check(tensors["nested_quant_map"], dtypes=float32, shape=(256,))
        outer = -(-blocks // NESTED_BLOCK_SIZE)
        folder.check(tensors["nested_absmax"], dtypes=float32, shape=(outer,))
    return StoredWeight(name, tensors, state.shape, partial(bitsandbytes.packed_4bit, state))
