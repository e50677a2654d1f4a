"""LazyLogits: a placeholder for logits that are never made; it records operations on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.errors import LogitsFreeLossError

_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_QUOTIENTS = {torch.div, torch.true_divide, torch.divide, Tensor.div, Tensor.__truediv__}


@dataclass(frozen=True, eq=False)
class LazyLogits:
    """The logits `outer * tanh(inner * z)`, or `inner * z` if outer is None, of z = head(hidden).

    hidden: the head's input [..., K]. model: the name of the model, for errors. shape, dtype,
    device: those of the logits [..., V]. Supports products and quotients with numbers, one tanh,
    and casts, which change nothing, as the loss is in float32 anyway. Any other operation raises
    LogitsFreeLossError.
    """

    hidden: Tensor
    head: nn.Module
    model: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    inner: float = 1.0
    outer: float | None = None

    @property
    def logit_scale(self) -> float:
        """The factor of z, in the form that `chunked_cross_entropy` takes."""
        return self.inner if self.outer is None else self.inner * self.outer

    @property
    def softcap(self) -> float | None:
        return self.outer

    def size(self, dimension: int | None = None) -> Any:
        return self.shape if dimension is None else self.shape[dimension]

    def dim(self) -> int:
        return len(self.shape)

    def float(self) -> LazyLogits:
        return replace(self, dtype=torch.float32)

    def to(self, *targets: Any) -> LazyLogits:
        dtypes = [target for target in targets if isinstance(target, torch.dtype)]
        return replace(self, dtype=dtypes[0]) if dtypes else self

    def contiguous(self) -> LazyLogits:
        return self

    def tanh(self) -> LazyLogits:
        if self.outer is not None:
            raise self._unknown("a second tanh")
        return replace(self, outer=1.0)

    def __mul__(self, factor: Any) -> LazyLogits:
        if type(factor) not in (int, float):
            raise self._unknown(f"a product with a {type(factor).__name__}")
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> LazyLogits:
        if type(divisor) not in (int, float):
            raise self._unknown(f"a division by a {type(divisor).__name__}")
        return self * (1.0 / divisor)

    def __rtruediv__(self, dividend: Any) -> Any:
        raise self._unknown("a division by the logits")

    def __add__(self, other: Any) -> Any:
        raise self._unknown("a sum")

    __radd__ = __sub__ = __rsub__ = __add__

    def __getattr__(self, name: str) -> Any:
        # Private names are asked for by code that tests for its own types, such as named tuples.
        if name.startswith("_"):
            raise AttributeError(name)
        raise self._unknown(f"'{name}'")

    def __getitem__(self, index: Any) -> Any:
        raise self._unknown("indexing")

    def _unknown(self, operation: str) -> LogitsFreeLossError:
        problem = f"applies to its logits an operation that is not supported: {operation}"
        return LogitsFreeLossError(model=self.model, problem=problem)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        lazy = next((each for each in args if isinstance(each, LazyLogits)), None)
        if lazy is None:
            lazy = next(each for each in kwargs.values() if isinstance(each, LazyLogits))
        elif not kwargs and func in (torch.tanh, Tensor.tanh):
            return lazy.tanh()
        elif not kwargs and len(args) == 2 and func in _PRODUCTS:
            return lazy * (args[1] if args[0] is lazy else args[0])
        elif not kwargs and len(args) == 2 and func in _QUOTIENTS and args[0] is lazy:
            return lazy / args[1]
        raise lazy._unknown(f"'{getattr(func, '__name__', func)}'")
