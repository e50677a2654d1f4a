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

from qlora_compile.hf.packings.bits import unpacked
from qlora_compile.hf.packings.integers import Grouped, packed_integers, setting_error
from qlora_compile.kernels.packed import PackedWeight

VERSIONS = {"gptq": 1, "gptq_v2": 2}
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqStorage(Grouped):
    """How a model is stored. version: 1 or 2."""

    bits: int
    version: int

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> GptqStorage:
        """Read a `quantization_config`, or a module's settings of the same names.

        Raises StoredWeightError.
        """
        stored, bits = settings.get("checkpoint_format", "gptq"), settings.get("bits")
        if stored not in VERSIONS:
            raise setting_error(f"checkpoint_format {stored!r}", ", ".join(map(repr, VERSIONS)))
        if settings.get("pack_dtype", "int32") != "int32":
            raise setting_error(f"pack_dtype {settings['pack_dtype']!r}", "'int32'")
        if rules := [rule for rule in settings.get("dynamic") or () if not rule.startswith("-:")]:
            found = f"dynamic, which gives {rules[0]!r} other bits"
            raise setting_error(found, "one number of bits")
        if bits not in _BITS:
            raise setting_error(f"bits {bits!r}", " or ".join(map(str, _BITS)))
        return cls(cls.size_in(settings), bits, VERSIONS[stored])


def packed(tensors: Mapping[str, Tensor], storage: GptqStorage) -> PackedWeight:
    """Return the weight [N, K] that `tensors` store.

    tensors: "codes", the qweight, int32 [K * bits / 32, N]: codes of a column in a stream of bits
    from the lowest on; "zeros", the qzeros, int32 [groups, N * bits / 32], likewise of a row;
    "scales" [groups, N]; and, where there is one, "index", the g_idx, int32 [K].

    In version 1 a zero may be 2 ** bits, as in AutoGPTQ's `qlinear_cuda`. Raises
    StoredWeightError.
    """
    bits, scales = storage.bits, tensors["scales"]
    columns = tensors["codes"].shape[0] * 32 // bits
    zeros = unpacked(tensors["zeros"], bits, scales.shape[1]).t()
    if storage.version == 1:
        zeros = zeros.to(torch.int16) + 1
        # 256 does not fit uint8, but is exact in every dtype of scales.
        zeros = zeros.to(scales.dtype) if bits == 8 else zeros
    return packed_integers(
        unpacked(tensors["codes"].t(), bits, columns),
        bits,
        scales.t(),
        zeros,
        group_size=storage.columns(columns),
        index=tensors.get("index"),
    )
