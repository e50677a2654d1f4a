"""Checkpoints of torchao, as `torchao.prototype.safetensors` writes them, version 0.18.

A tensor of torchao's, "NAME.weight", lies in several, "NAME._weight_qdata" and so on; the metadata
of the file's header tell its class and its attributes, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import FLOATS, Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings.fp8 import FORMATS, packed_fp8
from qlora_compile.kernels.packed import PackedWeight

_CODES = "_weight_qdata"


class TorchaoCheckpoint(Source):
    method: ClassVar[str] = "torchao"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for stem in stems(folder, f".{_CODES}"):
            codes, name = f"{stem}.{_CODES}", f"{stem}.weight"
            try:
                stated = json.loads(folder.metadata(codes)[name])
                kind, attributes = stated["_type"], dict(stated["_data"])
            except (KeyError, TypeError, ValueError) as error:
                problem = f"the file's metadata do not say what stores {name} ({error!r})"
                raise folder.error(codes, problem, AGAIN) from error
            if kind not in TENSORS:
                raise folder.error(
                    codes,
                    f"a {kind} stores it, which is none of {', '.join(TENSORS)}",
                    "load the model in 16 bits and quantise it here",
                )
            yield TENSORS[kind](folder, stem, attributes)


def _float8(folder: CheckpointFolder, stem: str, attributes: Mapping[str, Any]) -> StoredWeight:
    """`qdata`, float8 [N, K]; `scale`, one for each block of `block_size`, the tensor if empty."""
    tensors = {"weight": f"{stem}.{_CODES}", "scales": f"{stem}._weight_scale"}
    n, k = folder.check(tensors["weight"], dtypes=tuple(FORMATS), shape=(None, None))
    stored = attributes.get("block_size") or (n, k)
    if len(stored) != 2 or any(type(size) is not int or size < 1 for size in stored):
        raise folder.error(tensors["weight"], f"block_size is {stored!r}, not two sizes", AGAIN)
    block = stored[0], stored[1]
    grid = (-(-n // block[0]), -(-k // block[1]))
    if folder.check(tensors["scales"], dtypes=FLOATS) != () or grid != (1, 1):
        folder.check(tensors["scales"], shape=grid)
    return StoredWeight(f"{stem}.weight", tensors, (n, k), partial(_packed_float8, block))


def _packed_float8(block: tuple[int, int], tensors: Mapping[str, Tensor]) -> PackedWeight:
    return packed_fp8(tensors["weight"], tensors["scales"], block)


TENSORS: dict[str, Callable[[CheckpointFolder, str, Mapping[str, Any]], StoredWeight]] = {
    "Float8Tensor": _float8,
}
"""The classes of torchao that are read, each with what makes a weight of a module's name and the
tensor's attributes."""
