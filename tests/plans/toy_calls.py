"""Calls of `qlora_linear` that a toy variant computes, on the fake device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton import language as tl

from qlora_compile.kernels import op
from qlora_compile.kernels.call import Call, LinearCall
from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.layout import UNQUANTIZED, Layout
from qlora_compile.kernels.selection import Choice
from qlora_compile.kernels.variants.base import NO_CONFIG, LinearGradients, LinearTensors

N, K = 24, 16
F32 = torch.float32
TEXT = str(Call((LinearCall(Layout(UNQUANTIZED, (N, K))),), F32, F32, F32))

Body = Callable[[LinearTensors], Tensor]
"""What computes y of one Linear."""


@triton.jit
def copying_kernel(x, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < count), mask=at < count)


def copy(x: Tensor, out: Tensor) -> None:
    arguments = {"x": x, "out": out, "count": min(x.numel(), out.numel())}
    Launch(copying_kernel, (2,), arguments, {"SIZE": 64}).run()


def launching(tensors: LinearTensors) -> Tensor:
    """Launch twice, with scratch memory between. On the fake device y stays as allocated."""
    y = tensors.x.new_empty(tensors.x.shape[0], N)
    scratch = torch.empty_like(y)
    copy(tensors.x, scratch)
    copy(scratch, y)
    return y


def multiplying(tensors: LinearTensors) -> Tensor:
    """y, by an operator of torch, which does compute on the fake device."""
    return torch.mm(tensors.x, tensors.planes[0].t())


def multiplying_decoded(tensors: LinearTensors) -> Tensor:
    """As `multiplying`, of a packed weight; but of its size alone, not its values."""
    return torch.mm(tensors.x, tensors.x.new_ones(tensors.x.shape[1], N))


def _gradients(grads: Any, group: Any, needs: Any, config: Any) -> Any:
    return torch.mm(grads[0], group[0][0].planes[0]), [LinearGradients()]


@contextmanager
def computed_by(body: Body) -> Iterator[None]:
    """Make `body` the only variant inside the context. The gradient of x is that of
    `multiplying`."""
    variant: Any = mock.Mock(
        forward_group=lambda group, config: [body(group[0][0])], backward_group=_gradients
    )

    def choose(problem: Any, records: str) -> Choice:
        return Choice(variant, NO_CONFIG, 0.0)

    with mock.patch.object(op, "select", side_effect=choose):
        yield


def call(rows: int = 6, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    x = torch.randn(rows, K) if x is None else x
    weight = torch.randn(N, K) if weight is None else weight
    return op.QLORA_LINEAR(x, [weight], None, TEXT)[0]


def plans() -> int:
    return torch.ops.qlora_plans.counts()[0]


def keys() -> int:
    return torch.ops.qlora_plans.counts()[1]
