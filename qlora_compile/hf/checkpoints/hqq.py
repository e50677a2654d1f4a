"""Checkpoints of HQQ models, as transformers saves them with hqq 0.2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.checkpoints.folder import CheckpointFolder
from qlora_compile.hf.checkpoints.source import (
    FLOATS,
    Settings,
    Source,
    StoredWeight,
    named,
    stems,
)
from qlora_compile.hf.packings import hqq

_NUMBERS = ("group_size", "axis", "quant_scale", "quant_zero")
_MOST = 64
"""The most elements of a tensor that describes how others are stored."""


class HqqCheckpoint(Source):
    """A Linear NAME has "NAME.W_q", the codes, "NAME.scale", "NAME.zero", and a tensor for every
    entry of hqq's `meta`: numbers, a text as bytes, the shape."""

    method: ClassVar[str] = "hqq"
    beside: ClassVar[tuple[str, ...]] = (
        *(f".{name}" for name in (*_NUMBERS, "shape", "packing", "nbits", "view_as_float")),
        *(".unpack_view_dtype", ".compute_dtype", ".offload_meta", ".encoded_state_dict"),
        *(".stores_quant_config", ".channel_wise", ".optimize", ".round_zero"),
    )

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for stem in stems(folder, ".W_q"):
            meta = {name: _read(folder, f"{stem}.{name}") for name in (*_NUMBERS, "shape")}
            meta["packing"] = _text(folder, f"{stem}.packing")
            with named(folder, {"meta": f"{stem}.packing"}):
                storage = hqq.HqqStorage.read(meta)
            tensors = {"codes": f"{stem}.W_q", "scales": f"{stem}.scale", "zeros": f"{stem}.zero"}
            folder.check(tensors["codes"], shape=(None, None))
            for role in ("scales", "zeros"):
                folder.check(tensors[role], dtypes=FLOATS, shape=(storage.runs, 1))
            pack = partial(hqq.packed, storage=storage)
            yield StoredWeight(f"{stem}.weight", tensors, storage.shape, pack)


def _read(folder: CheckpointFolder, name: str) -> Any:
    """Return the number, or the list of numbers, that a small tensor of integers holds."""
    shape = folder.check(name, dtypes=(torch.uint8, torch.int32, torch.int64))
    if len(shape) > 1 or sum(shape) > _MOST:
        raise folder.error(name, f"its shape is {list(shape)}", "save the model again")
    return folder.read(name).tolist()


def _text(folder: CheckpointFolder, name: str) -> str:
    found = _read(folder, name)
    with named(folder, {"text": name}):
        if not isinstance(found, list):
            raise StoredWeightError(
                tensor="text", problem="it is not text", remedy="save the model again"
            )
    return "".join(map(chr, found))
