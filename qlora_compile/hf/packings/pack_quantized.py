"""compressed-tensors' integers: "pack-quantized" and "int-quantized", version 0.20."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.bits import unpacked
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight

_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class IntegerScheme:
    """The settings in the `weights` of a config group. group_size: None for a scale per row, or
    one for the tensor."""

    bits: int
    group_size: int | None
    symmetric: bool

    def groups(self, columns: int) -> int:
        """Return how many groups so many columns have."""
        return 1 if self.group_size is None else -(-columns // self.group_size)

    @classmethod
    def read(cls, weights: Mapping[str, Any]) -> IntegerScheme:
        """Read the `weights` of a config group, or of a module's scheme. Raises
        StoredWeightError."""
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        if weights.get("type") != "int" or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise _error(f"weights of {bits!r} bits, type {weights.get('type')!r}")
        if strategy not in _STRATEGIES:
            raise _error(f"the strategy {strategy!r}, none of {', '.join(_STRATEGIES)}")
        group_size = weights.get("group_size") if strategy == "group" else None
        if strategy == "group" and (not isinstance(group_size, int) or group_size < 1):
            raise _error(f"group_size {group_size!r}")
        return cls(bits, group_size, bool(weights.get("symmetric", True)))


def _error(found: str) -> StoredWeightError:
    remedy = "quantise the model again to integers of 1 to 8 bits, by group, channel or tensor"
    return StoredWeightError(tensor="quantization_config", problem=f"it has {found}", remedy=remedy)


def packed(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], scheme: IntegerScheme
) -> PackedWeight:
    """Return the weight of `shape` [N, K] that `tensors` store.

    tensors: "codes", int32 [N, ceil(K * bits / 32)], a row's codes plus 2 ** (bits - 1) in a stream
    of bits from the lowest on, or int8 [N, K]; "scales" [N, groups], or [1]; "zeros", where the
    scheme is not symmetric: int32 [ceil(N * bits / 32), groups], packed likewise column by column,
    or int8 [N, groups]; "index", the weight_g_idx [K], may be there. Raises StoredWeightError.
    """
    (rows, columns), bits = shape, scheme.bits
    middle = 2 ** (bits - 1)
    group_size = scheme.group_size or columns
    groups = scheme.groups(columns)
    scales = tensors["scales"]
    scales = scales.reshape(1, 1).expand(rows, 1) if scales.numel() == 1 else scales
    zeros: Tensor | int = middle
    if not scheme.symmetric:
        stored = tensors["zeros"]
        if stored.dtype == torch.int32:
            zeros = unpacked(stored.t(), bits, rows).t()
        else:
            zeros = (stored.reshape(-1, groups).to(torch.int16) + middle).expand(rows, groups)
    index = tensors.get("index")
    # compressed-tensors writes -1 where there is no act-order.
    if index is not None and bool((index == -1).all()):
        index = None
    codes = tensors["codes"]
    if codes.dtype == torch.int32:
        codes = unpacked(codes, bits, columns)
    else:
        raised = codes.to(torch.int16) + middle
        if bool((raised < 0).any()) or bool((raised >= 2**bits).any()):
            problem = f"it has codes beyond the {bits} bits that config.json states"
            raise StoredWeightError(
                tensor="codes", problem=problem, remedy="download config.json again"
            )
        codes = raised.to(torch.uint8)
    return packed_integers(codes, bits, scales, zeros, group_size=group_size, index=index)
