"""AWQ's 4-bit weights (Lin et al. 2024), as AutoAWQ's GEMM version stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlora_compile.checkpoint_errors import StoredWeightError
from qlora_compile.hf.packings.bits import unpacked
from qlora_compile.hf.packings.integers import packed_integers
from qlora_compile.kernels.packed import PackedWeight

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight codes of a word belongs to each of its eight columns."""


@dataclass(frozen=True)
class AwqStorage:
    """How a model is stored. group_size: -1 for whole rows of the weight."""

    group_size: int

    def groups(self, columns: int) -> int:
        """Return how many groups so many columns have."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> AwqStorage:
        """Read a `quantization_config`. Raises StoredWeightError."""
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise _error(f"version {version!r}", "'gemm'")
        if settings.get("bits", 4) != 4:
            raise _error(f"bits {settings['bits']!r}", "4")
        group_size = settings.get("group_size", 128)
        if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
            raise _error(f"group_size {group_size!r}", "a number of columns, or -1")
        return cls(group_size)


def _error(found: str, known: str) -> StoredWeightError:
    problem, remedy = f"it has {found}, not {known}", f"convert the model to {known}"
    return StoredWeightError(tensor="quantization_config", problem=problem, remedy=remedy)


def packed(tensors: Mapping[str, Tensor], storage: AwqStorage) -> PackedWeight:
    """Return the weight [N, K] that `tensors` store.

    tensors: "codes", the qweight, int32 [K, N / 8]: eight columns of N in a word, in an order of
    AWQ's own; "zeros", the qzeros, int32 [groups, N / 8], likewise, or none where every zero is 8;
    "scales" [groups, N]. Raises StoredWeightError.
    """
    codes, scales = _columns(tensors["codes"]).t(), tensors["scales"].t()
    zeros = _columns(tensors["zeros"]).t() if "zeros" in tensors else 8
    group_size = codes.shape[1] if storage.group_size == -1 else storage.group_size
    return packed_integers(codes, 4, scales, zeros, group_size=group_size)


def _columns(words: Tensor) -> Tensor:
    codes = unpacked(words, 4, 8 * words.shape[1]).view(*words.shape, 8)
    return codes[:, :, list(_PLACES)].flatten(1)
