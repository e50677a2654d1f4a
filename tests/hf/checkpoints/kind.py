"""Kind: one way to store a weight in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One way to store a weight [N, K].

    settings: the `quantization_config`. encode: makes the tensors, by the ends of their names.
    decode: another library's decoder of them, to float32 [N, K]. format: ours. exact: whether both
    decode to the same values, bit for bit; if not, they differ in the last bits of float32. merged:
    whether the experts of a layer are stored in one tensor.
    """

    settings: dict[str, Any]
    encode: Callable[[Tensor], dict[str, Tensor]]
    decode: Callable[[dict[str, Tensor]], Tensor]
    format: str
    exact: bool = True
    merged: bool = False

    @property
    def method(self) -> str:
        return self.settings["quant_method"]
