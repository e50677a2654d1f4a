"""PackedExperts: one frozen weight of all experts of a layer, stored packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.registry import format_named
from qlora_compile.modules.packed import PackedModule


class PackedExperts(PackedModule):
    """Takes the place of an experts module's Parameter, [E, N, K] or, if `transposed`, [E, K, N].

    The weight is one PackedWeight [E * N, K], with expert e in the rows from e * N on, so that
    blocks run along K whatever the Parameter's layout was. `dtype`, `shape` and `device` are those
    of the Parameter. Products run in `dtype`, which a cast of the module changes.
    """

    requires_grad = False

    def __init__(
        self, packed: PackedWeight, experts: int, transposed: bool, weight_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.experts, self.k = experts, packed.shape[1]
        self.n = packed.shape[0] // experts
        self.transposed = transposed
        self.weight_dtype = weight_dtype
        self.store(packed)

    @classmethod
    def from_parameter(
        cls,
        parameter: nn.Parameter,
        format: str,
        *,
        transposed: bool,
        site: str = "weight",
        **options: Any,
    ) -> PackedExperts:
        """Pack `parameter`; options and errors are those of `QuantFormat.quantize`."""
        packed = format_named(format).quantize(
            _rows(parameter.detach(), transposed),
            site=site,
            **options,
        )
        return cls(packed, parameter.shape[0], transposed, parameter.dtype)

    @property
    def packed_shape(self) -> tuple[int, int]:
        return self.experts * self.n, self.k

    @property
    def shape(self) -> torch.Size:
        columns = (self.k, self.n) if self.transposed else (self.n, self.k)
        return torch.Size((self.experts, *columns))

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def parameter(self) -> nn.Parameter:
        """Return the decoded weight as a frozen Parameter, in the layout of the original one."""
        weight = self.dequantize().view(self.experts, self.n, self.k)
        weight = weight.transpose(1, 2).contiguous() if self.transposed else weight
        return nn.Parameter(weight, requires_grad=False)

    def pack(self, weight: Tensor) -> None:
        """Replace the weight by `weight`, which has the layout of the original Parameter."""
        self.requantize(_rows(weight, self.transposed))

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}{super().extra_repr()}"


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    weight = weight.transpose(1, 2) if transposed else weight
    return weight.reshape(-1, weight.shape[-1])
