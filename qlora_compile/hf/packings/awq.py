"""AWQ's 4-bit weights (Lin et al. 2024), as AutoAWQ's GEMM version stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_compile.hf.packings.bits import unpacked
from qlora_compile.hf.packings.integers import Grouped, packed_integers, setting_error
from qlora_compile.kernels.packed import PackedWeight

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position in a word of the code of each of its eight columns."""


@dataclass(frozen=True)
class AwqStorage(Grouped):
    """How a model is stored."""

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> AwqStorage:
        """Read a `quantization_config`. Raises StoredWeightError."""
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise setting_error(f"version {version!r}", "'gemm'")
        if settings.get("bits", 4) != 4:
            raise setting_error(f"bits {settings['bits']!r}", "4")
        return cls(cls.size_in(settings))


def packed(tensors: Mapping[str, Tensor], storage: AwqStorage) -> PackedWeight:
    """Return the weight [N, K] that `tensors` store.

    tensors: "codes", the qweight, int32 [K, N / 8]: eight columns of N in a word, in an order of
    AWQ's own; "zeros", the qzeros, int32 [groups, N / 8], likewise, or none if every zero is 8;
    "scales" [groups, N]. Raises StoredWeightError.
    """
    codes, scales = _columns(tensors["codes"]).t(), tensors["scales"].t()
    zeros = _columns(tensors["zeros"]).t() if "zeros" in tensors else 8
    return packed_integers(codes, 4, scales, zeros, group_size=storage.columns(codes.shape[1]))


def _columns(words: Tensor) -> Tensor:
    codes = unpacked(words, 4, 8 * words.shape[1]).view(*words.shape, 8)
    return codes[:, :, list(_PLACES)].flatten(1)
