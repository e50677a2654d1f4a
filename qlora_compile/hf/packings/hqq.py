"""HQQ's weights (Badri and Shaji 2023), as the package hqq stores them, version 0.2.8.

A weight [N, K] is cut into runs of `group_size` in row-major order, one run a row of `W_q`; each
run has a scale and a zero point, and a value is (code - zero) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight

_PACKINGS = {
    "8bit_u8": (8, torch.uint8),
    "4bit_u8": (4, torch.uint8),
    "3bit_32": (3, torch.int32),
    "2bit_u8": (2, torch.uint8),
    "1bit_u8": (1, torch.uint8),
}
"""By the name of a packing: the bits of a code, and the dtype of an item that holds several."""


@dataclass(frozen=True)
class HqqStorage:
    """How one weight is stored. packing: hqq's name for it."""

    shape: tuple[int, int]
    group_size: int
    packing: str

    @property
    def runs(self) -> int:
        """How many runs the weight is cut into."""
        return math.prod(self.shape) // self.group_size

    @property
    def format(self) -> str:
        """The name of the format that holds the weight."""
        return "int4" if _PACKINGS[self.packing][0] <= 4 else "uint8"

    @classmethod
    def read(cls, meta: Mapping[str, Any]) -> HqqStorage:
        """Read the `meta` of an HQQLinear. Raises StoredWeightError."""
        packing, axis = meta.get("packing"), meta.get("axis")
        if packing not in _PACKINGS:
            known = " or ".join(_PACKINGS)
            raise _error(f"packing is {packing!r}, not {known}", "pack the codes with hqq 0.2")
        if axis != 1:
            problem = f"axis is {axis}: scales belong to columns of the weight, not parts of rows"
            raise _error(problem, "quantise the model again with axis=1")
        if meta.get("quant_scale") or meta.get("quant_zero"):
            problem = "its scales or zero points are quantised themselves"
            raise _error(problem, "quantise the model again with hqq 0.2.8 or later")
        shape, group_size = tuple(meta.get("shape", ())), meta.get("group_size")
        if len(shape) != 2 or not isinstance(group_size, int) or group_size < 1:
            problem = f"shape is {list(shape)}, group_size {group_size!r}"
            raise _error(problem, "quantise the model again")
        if min(shape) < 1 or math.prod(shape) % group_size:
            problem = f"{list(shape)} is not divisible into groups of {group_size}"
            raise _error(problem, "quantise the model again")
        return cls((int(shape[0]), int(shape[1])), group_size, packing)


def _error(problem: str, remedy: str) -> StoredWeightError:
    return StoredWeightError(tensor="meta", problem=problem, remedy=remedy)


def packed(tensors: Mapping[str, Tensor], storage: HqqStorage) -> PackedWeight:
    """Return the weight [N, K] that `tensors` store.

    tensors: "codes", the W_q; "scales" and "zeros", floats, one for each run. Raises
    StoredWeightError.
    """
    (rows, columns), group_size = storage.shape, storage.group_size
    runs = storage.runs
    bits, container = _PACKINGS[storage.packing]
    per_item = torch.iinfo(container).bits // bits
    stored = tensors["codes"]
    # hqq may keep the codes as floats of the same bytes.
    if stored.is_floating_point() and stored.dim() == 2:
        stored = stored.view(container)
    if stored.dtype != container or stored.shape != (math.ceil(runs / per_item), group_size):
        problem = f"it is {stored.dtype} {list(stored.shape)}, not {runs} runs in {storage.packing}"
        raise StoredWeightError(tensor="codes", problem=problem, remedy="quantise the model again")
    # The first part of the runs is in the highest bits.
    shifts = range((per_item - 1) * bits, -1, -bits)
    parts = [(stored >> shift & (2**bits - 1)).to(torch.uint8) for shift in shifts]
    codes = torch.cat(parts)[:runs].reshape(rows, columns)
    shared = math.gcd(group_size, columns)
    factors = []
    for role in ("scales", "zeros"):
        if tensors[role].numel() != runs:
            problem = f"it has {tensors[role].numel()} elements, not {runs}"
            raise StoredWeightError(tensor=role, problem=problem, remedy="quantise the model again")
        repeated = tensors[role].reshape(-1).repeat_interleave(group_size // shared)
        factors.append(repeated.view(rows, columns // shared))
    return packed_integers(codes, bits, *factors, group_size=shared)
