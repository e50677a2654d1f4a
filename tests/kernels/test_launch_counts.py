"""The number of launches of a Llama layer on a GPU, with none of torch's among them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.host.calls import CALLS, FusedCall
from bench.host.table import LAUNCHES_TARGET
from qlora_compile.kernels.gpu import thin_products
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.linear_call import bound
from qlora_compile.kernels.variants.tail import Tail

STARTS_NOTHING = {
    "empty",
    "new_empty",
    "empty_like",
    "split",
    "t",
    "view",
    "slice",
    "select",
    "detach",
    "split_with_sizes",
}
"""Operators that allocate memory, or look at it in another way."""


class Operators(TorchDispatchMode):
    """Counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count[name] += name not in STARTS_NOTHING
        return func(*args, **kwargs or {})


def launches(fused: FusedCall, *, backward: bool) -> list[Launch]:
    """Return the launches of a call of *tail* in its first config; check that torch starts none."""
    tail, call = Tail(), fused.call
    low = fused.tensors[-1] if backward else torch.empty(fused.x.shape[0], call.rank)
    group = bound(call, fused.x, fused.tensors, None, low)
    config = tail.shipped("sm_90")[0]
    for _ in range(2):  # The first makes tables that stay.
        operators = Operators()
        with torch.no_grad(), assuming("sm_90", "cpu"), recording() as found, operators:
            if backward:
                tail.backward_group(fused.grads, group, call.needs, config)
            else:
                tail.forward_group(group, config)
    assert not +operators.count  # pyright: ignore[reportPossiblyUnboundVariable]
    return found  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.fixture(autouse=True)
def as_at_real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums are added up, and fresh memory is not filled."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(thin_products, "splits_of", lambda programs, steps: 8)


def test_a_layer_takes_few_launches() -> None:
    total = 0
    for k, columns in CALLS.values():
        forward = FusedCall.of(k, columns, "")
        count = len(launches(forward, backward=False))
        # One of each thin kind serves all siblings; each one's weight is decoded and multiplied.
        assert count == 2 + 2 * len(columns)
        backward = launches(forward.backward(), backward=True)
        assert len(backward) == 5 + 2 * len(columns)
        total += count + len(backward)
    assert total <= LAUNCHES_TARGET


def test_an_adapter_with_other_strides_gets_launches_of_its_own() -> None:
    fused = FusedCall.of(128, (128, 64, 64), "")
    tensors = list(fused.tensors)
    odd = next(i for i, t in enumerate(tensors) if t.requires_grad)
    tensors[odd] = tensors[odd].detach().t().contiguous().t()
    changed = FusedCall(fused.call, fused.x, tensors, fused.grads)
    assert len(launches(changed, backward=False)) == 2 * 2 + 2 * 3
