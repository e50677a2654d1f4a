"""GPTQ's weights (Frantar et al. 2023), as AutoGPTQ and GPTQModel store them.

Version 1, the "gptq" of both packages, stores every zero point minus one; version 2, GPTQModel's
"gptq_v2", stores it as it is. With act-order (`desc_act`), `g_idx` tells the group of each row of
`qweight`.
"""

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

VERSIONS = {"gptq": 1, "gptq_v2": 2}
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqStorage:
    """How a model is stored. group_size: -1 for whole columns of the transposed weight. version: 1
    or 2."""

    bits: int
    group_size: int
    version: int

    def groups(self, columns: int) -> int:
        """Return how many groups so many columns have."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> GptqStorage:
        """Read a `quantization_config`, or a module's settings of the same names.

        Raises StoredWeightError.
        """
        stored = settings.get("checkpoint_format") or "gptq"
        if stored not in VERSIONS:
            raise _error(f"checkpoint_format {stored!r}", ", ".join(map(repr, VERSIONS)))
        if settings.get("pack_dtype", "int32") != "int32":
            raise _error(f"pack_dtype {settings['pack_dtype']!r}", "'int32'")
        if rules := [rule for rule in settings.get("dynamic") or () if not rule.startswith("-:")]:
            raise _error(f"dynamic, which gives {rules[0]!r} bits of its own", "one number of bits")
        bits, group_size = settings.get("bits"), settings.get("group_size", 128)
        if bits not in _BITS:
            raise _error(f"bits {bits!r}", " or ".join(map(str, _BITS)))
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise _error(f"group_size {group_size!r}", "a number of columns, or -1")
        return cls(bits, group_size, VERSIONS[stored])


def _error(found: str, known: str) -> StoredWeightError:
    problem, remedy = f"it has {found}, not {known}", f"convert the model to {known}"
    return StoredWeightError(tensor="quantization_config", problem=problem, remedy=remedy)


def packed(tensors: Mapping[str, Tensor], storage: GptqStorage) -> PackedWeight:
    """Return the weight [N, K] that `tensors` store.

    tensors: "codes", the qweight, int32 [K * bits / 32, N]: codes of a column in a stream of bits
    from the lowest on; "zeros", the qzeros, int32 [groups, N * bits / 32], likewise of a row;
    "scales" [groups, N]; and, where there is one, "index", the g_idx, int32 [K].

    A zero of version 1 may be 2 ** bits, as AutoGPTQ's `qlinear_cuda` has it. Raises
    StoredWeightError.
    """
    bits, scales = storage.bits, tensors["scales"]
    columns = tensors["codes"].shape[0] * 32 // bits
    zeros = unpacked(tensors["zeros"], bits, scales.shape[1]).t()
    if storage.version == 1:
        zeros = zeros.to(torch.int16) + 1
        # 256 is no uint8, but is exact in every dtype of scales.
        zeros = zeros.to(scales.dtype) if bits == 8 else zeros
    return packed_integers(
        unpacked(tensors["codes"].t(), bits, columns),
        bits,
        scales.t(),
        zeros,
        group_size=columns if storage.group_size == -1 else storage.group_size,
        index=tensors.get("index"),
    )
