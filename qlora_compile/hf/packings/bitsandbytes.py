"""bitsandbytes' 4-bit and 8-bit weights, as its state dicts have them.

The formats are those of QLoRA and LLM.int8() (Dettmers et al. 2023, 2022); the names of the tensors
and of the values beside them are those of `bitsandbytes.functional.QuantState.as_dict`, 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.errors import BlockSizeError
from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.formats.base import checked_block_size
from qlora_compile.kernels.formats.blocks import block_layout
from qlora_compile.kernels.formats.fp4 import FP4
from qlora_compile.kernels.formats.int8 import INT8
from qlora_compile.kernels.formats.nested import NESTED_BLOCK_SIZE
from qlora_compile.kernels.formats.nf4 import NF4
from qlora_compile.kernels.packed import PackedWeight

FORMATS_OF_4_BITS = {each.name: each for each in (NF4, FP4)}
_ROW = 0  # bitsandbytes' number for codes in the order of rows
_AGAIN = "download the file again"


@dataclass(frozen=True)
class State4bit:
    """The state beside a 4-bit weight's tensors. offset: None without double quantisation."""

    kind: str
    shape: tuple[int, int]
    block_size: int
    offset: float | None

    @classmethod
    def read(cls, stored: Tensor) -> State4bit:
        """Read the state from `stored`, uint8 with the bytes of a JSON object.

        Raises StoredWeightError.
        """
        try:
            values: dict[str, Any] = parsed_json(bytes(stored.tolist()))
            rows, columns = (int(size) for size in values["shape"])
            offset = values.get("nested_offset")
            state = cls(
                kind=values["quant_type"],
                shape=(rows, columns),
                block_size=checked_block_size(values["blocksize"]),
                offset=None if offset is None else float(offset),
            )
        except (ValueError, KeyError, TypeError, AttributeError, BlockSizeError) as error:
            raise _error("state", f"the quantisation state cannot be read ({error})") from error
        if state.kind not in FORMATS_OF_4_BITS:
            raise _error("state", f"quant_type is {state.kind!r}, not nf4 or fp4")
        if rows < 1 or columns < 1:
            raise _error("state", f"the shape is {list(state.shape)}, with nothing in it")
        nested = values.get("nested_blocksize", NESTED_BLOCK_SIZE)
        if nested != NESTED_BLOCK_SIZE:
            problem = f"nested_blocksize is {nested}, not {NESTED_BLOCK_SIZE}"
            raise _error(
                "state", problem, "quantise the model again with bitsandbytes 0.38 or later"
            )
        return state


def packed_4bit(state: State4bit, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Make a PackedWeight of a 4-bit weight's tensors, sharing their memory.

    tensors: "weight", two codes a byte in any dtype; "absmax", float32, or uint8 beside
    "nested_absmax" and "nested_quant_map"; "quant_map", float32 [16]. Raises StoredWeightError.
    """
    quant_format = FORMATS_OF_4_BITS[state.kind]
    if not torch.equal(tensors["quant_map"], quant_format.codebook_on(tensors["quant_map"].device)):
        raise _error("quant_map", f"the values of the codes are not those of {state.kind}")
    planes = [tensors["weight"].view(torch.uint8).reshape(-1), tensors["absmax"]]
    if state.offset is not None:
        offset = torch.tensor(state.offset, dtype=torch.float32, device=planes[0].device)
        planes += [tensors["nested_quant_map"], tensors["nested_absmax"], offset]
    layout = block_layout(state.kind, state.shape, state.block_size, state.offset is not None)
    return quant_format.packed(layout, planes)


def packed_8bit(tensors: Mapping[str, Tensor]) -> PackedWeight:
    """Make a PackedWeight of an 8-bit weight's tensors, sharing their memory.

    tensors: "weight", int8 [N, K]; "SCB", the float32 absmax [N] of its rows; "weight_format",
    uint8 [], may be there. Raises StoredWeightError.
    """
    order = int(tensors["weight_format"]) if "weight_format" in tensors else _ROW
    if order != _ROW:
        remedy = "save the model again with bitsandbytes 0.43 or later"
        raise _error("weight_format", f"the order of the codes is {order}, not by rows", remedy)
    weight = tensors["weight"]
    layout = block_layout("int8", (weight.shape[0], weight.shape[1]), weight.shape[1], False)
    return INT8.packed(layout, [weight, tensors["SCB"]])


def _error(tensor: str, problem: str, remedy: str = _AGAIN) -> StoredWeightError:
    return StoredWeightError(tensor=tensor, problem=problem, remedy=remedy)
