"""Times a replayed call beside a call of an op in C++ that does nothing, with as many tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from bench.host.calls import CALLS, FusedCall, least
from bench.host.tail import choose_tail
from qlora_compile.kernels.op import QLORA_LINEAR, QLORA_LINEAR_BACKWARD
from qlora_compile.kernels.selector import Selector

_SOURCE = """
#include <torch/library.h>

static void nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  torch::jit::drop(*stack, op.schema().arguments().size());
  stack->emplace_back(std::vector<at::Tensor>());
}

TORCH_LIBRARY(qlora_bench, m) {
  m.def("forward(Tensor x, Tensor[] tensors, Tensor? seed, str call) -> Tensor[]",
      torch::CppFunction::makeFromBoxedFunction<&nothing>());
  m.def("backward(Tensor[] grads, Tensor x, Tensor[] tensors, Tensor? seed, str call) -> Tensor[]",
      torch::CppFunction::makeFromBoxedFunction<&nothing>());
}
"""


@functools.cache
def _empty(direction: str) -> Any:
    from torch._inductor.codecache import CppCodeCache

    CppCodeCache.load(_SOURCE, "cpu")
    return getattr(torch.ops.qlora_bench, direction).default


@torch.no_grad()
def measured_replays(repeats: int, names: Iterable[str] = CALLS) -> list[dict[str, Any]]:
    """Return, for each call in both directions as compiled code makes it, the microseconds of its
    replay and of the empty op, in turn. The driver must be set to charge launches nothing."""
    selector = Selector("replays")
    found = []
    for name in names:
        k, columns = CALLS[name]
        fused = FusedCall.of(k, columns, selector.name)
        back = fused.backward()
        text = str(fused.call)
        QLORA_LINEAR(fused.x, fused.tensors, None, text)
        QLORA_LINEAR_BACKWARD(fused.grads, fused.x, back.tensors, None, str(back.call))
        choose_tail(selector)
        forward = (fused.x, fused.tensors, None, text)
        backward = (fused.grads, fused.x, back.tensors, None, str(back.call))
        for direction, op, arguments in (
            ("forward", QLORA_LINEAR, forward),
            ("backward", QLORA_LINEAR_BACKWARD, backward),
        ):
            runs = [functools.partial(each, *arguments) for each in (op, _empty(direction))]
            for _ in range(2):
                runs[0]()
            replayed, empty = least(runs, repeats)
            found.append(
                {"name": name, "direction": direction, "replayed": replayed, "empty": empty}
            )
    return found
