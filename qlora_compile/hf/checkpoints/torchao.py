"""Checkpoints of torchao, as `torchao.prototype.safetensors` writes them, version 0.18.

A torchao tensor "NAME.weight" is stored as several tensors, "NAME._weight_qdata" and so on; the
metadata in the file's header hold its class and attributes as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from qlora_compile.hf.checkpoints.folder import AGAIN, CheckpointFolder
from qlora_compile.hf.checkpoints.source import FLOATS, Settings, Source, StoredWeight, stems
from qlora_compile.hf.packings import torchao_integers
from qlora_compile.hf.packings.fp8 import FORMATS, packed_fp8
from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.packed import PackedWeight

_CODES = "_weight_qdata"


class TorchaoCheckpoint(Source):
    method: ClassVar[str] = "torchao"

    def weights(self, folder: CheckpointFolder, settings: Settings) -> Iterator[StoredWeight]:
        for stem in stems(folder, f".{_CODES}"):
            codes, name = f"{stem}.{_CODES}", f"{stem}.weight"
            try:
                stated = parsed_json(folder.metadata(codes)[name])
                kind, attributes = stated["_type"], dict(stated["_data"])
            except (KeyError, TypeError, ValueError) as error:
                problem = f"the file's metadata do not say which class stores {name} ({error!r})"
                raise folder.error(codes, problem, AGAIN) from error
            if kind not in TENSORS:
                raise folder.error(
                    codes,
                    f"its class is {kind}, which is none of {', '.join(TENSORS)}",
                    "load the model in 16 bits and quantise it here",
                )
            yield TENSORS[kind](folder, stem, attributes)


def _float8(folder: CheckpointFolder, stem: str, attributes: Mapping[str, Any]) -> StoredWeight:
    """`qdata`, float8 [N, K]; `scale`, one for each block of `block_size`, the tensor if empty."""
    tensors = {"weight": f"{stem}.{_CODES}", "scales": f"{stem}._weight_scale"}
    n, k = folder.check(tensors["weight"], dtypes=tuple(FORMATS), shape=(None, None))
    block = _block(folder, tensors["weight"], attributes, (n, k))
    grid = (-(-n // block[0]), -(-k // block[1]))
    if folder.check(tensors["scales"], dtypes=FLOATS) != () or grid != (1, 1):
        folder.check(tensors["scales"], shape=grid)
    return StoredWeight(f"{stem}.weight", tensors, (n, k), partial(_packed_float8, block))


def _integers(folder: CheckpointFolder, stem: str, attributes: Mapping[str, Any]) -> StoredWeight:
    """`qdata`, int8 [N, K]; `scale` and perhaps `zero_point`, one for each block."""
    tensors = {"codes": f"{stem}.{_CODES}", "scales": f"{stem}._weight_scale"}
    n, k = folder.check(tensors["codes"], dtypes=(torch.int8,), shape=(None, None))
    block = _block(folder, tensors["codes"], attributes, (n, k))
    grid = (-(-n // block[0]), -(-k // block[1]))
    folder.check(tensors["scales"], dtypes=FLOATS, shape=grid)
    if (zeros := f"{stem}._weight_zero_point") in folder.tensors:
        folder.check(zeros, dtypes=(torch.int8, *FLOATS), shape=grid)
        tensors["zeros"] = zeros
    if (odd := f"{stem}._weight_act_pre_scale") in folder.tensors:
        remedy = "quantise the model without SmoothQuant and AWQ"
        raise folder.error(odd, "torchao multiplies the input by this tensor", remedy)
    target = attributes.get("target_dtype") or {"_data": "int8"}
    if not isinstance(target, dict) or target.get("_data") not in _BITS:
        known = ", ".join(_BITS)
        raise folder.error(tensors["codes"], f"target_dtype is {target}, not {known}", AGAIN)
    pack = partial(torchao_integers.packed, block=block, bits=_BITS[target["_data"]])
    return StoredWeight(f"{stem}.weight", tensors, (n, k), pack)


_BITS = {f"int{bits}": bits for bits in range(1, 9)}


def _block(
    folder: CheckpointFolder, name: str, attributes: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[int, int]:
    """Return the rows and columns of a block; all rows and columns if `block_size` is empty."""
    stored = attributes.get("block_size") or shape
    if len(stored) != 2 or any(type(size) is not int or size < 1 for size in stored):
        raise folder.error(name, f"block_size is {stored!r}, not two sizes", AGAIN)
    return stored[0], stored[1]


def _packed_float8(block: tuple[int, int], tensors: Mapping[str, Tensor]) -> PackedWeight:
    return packed_fp8(tensors["weight"], tensors["scales"], block)


TENSORS: dict[str, Callable[[CheckpointFolder, str, Mapping[str, Any]], StoredWeight]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _integers,
    "IntxUnpackedToInt8Tensor": _integers,
}
"""The classes of torchao that are read, each with what makes a weight of a module's name and the
tensor's attributes."""
