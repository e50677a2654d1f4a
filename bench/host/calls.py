"""Measures the host's time of each fused call of a Llama block, split by layer of software."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.host.launches import torch_launches
from bench.host.sizes import (
    BATCH,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUE_HEADS,
    LENGTH,
    RANK,
)
from bench.host.tail import choose_tail
from qlora_compile.kernels import op
from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.gpu.launch import recording
from qlora_compile.kernels.linear_call import bound, problem_of
from qlora_compile.kernels.plans import native as plans
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.selector import Selector, select, selector_named
from tests.fake_device.device import LAUNCH_SECONDS

ROWS = BATCH * LENGTH
_KEY_VALUE = HIDDEN * KEY_VALUE_HEADS // HEADS

CALLS: dict[str, tuple[int, tuple[int, ...]]] = {
    "q, k, v": (HIDDEN, (HIDDEN, _KEY_VALUE, _KEY_VALUE)),
    "o": (HIDDEN, (HIDDEN,)),
    "gate, up": (HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    "down": (INTERMEDIATE, (HIDDEN,)),
}
"""K and the N of each sibling."""

LAYERS = ("dispatcher, autograd", "call, choice", "variant, torch", "launches", "rest")
"""The parts of a call's microseconds; launches: key, Triton's launcher, the driver."""


@dataclass(frozen=True)
class FusedCall:
    """One fused call. tensors: in the order of `tensor_indices`; grads: those of every y."""

    call: Call
    x: Tensor
    tensors: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def of(cls, k: int, columns: Sequence[int], records: str) -> FusedCall:
        quant_format, bf16 = format_named("nf4"), torch.bfloat16
        linears, tensors = [], []
        for n in columns:
            packed = quant_format.quantize(torch.randn(n, k), double_quantize=True)
            linears.append(LinearCall(packed.layout, rank=RANK))
            factors = torch.randn(RANK, k), torch.randn(n, RANK)
            tensors += [*packed.tensors, *(f.requires_grad_() for f in factors), torch.ones(1)]
        dtypes = (bf16, torch.float32, bf16)
        call = Call(tuple(linears), *dtypes, save_low_rank=True, records=records)
        x = torch.randn(ROWS, k, dtype=bf16).requires_grad_()
        return cls(call, x, tensors, [torch.randn(ROWS, n, dtype=bf16) for n in columns])

    def backward(self) -> FusedCall:
        """Return the call that computes every gradient; its last tensor is S."""
        low = torch.randn(ROWS, self.call.rank)
        needs = replace(self.call, needs=NeedsGradient(x=True, adapter=True))
        return replace(self, call=needs, tensors=[*self.tensors, low])


def measured_calls(repeats: int, names: Iterable[str] = CALLS) -> list[dict[str, Any]]:
    """Return, for each call in both directions without plans, its launches, ours and torch's, and
    the microseconds of the whole and of each of `LAYERS`: the least of `repeats` timings. The cost
    of torch's launches is added here, of Triton's by the device."""
    selector = Selector("host")
    found = []
    for name in names:
        k, columns = CALLS[name]
        forward = FusedCall.of(k, columns, selector.name)
        both: dict[Direction, FusedCall] = {"forward": forward, "backward": forward.backward()}
        for direction, call in both.items():
            with plans.off():
                _run(call, direction)()
                choose_tail(selector)
                split = _split(call, direction, repeats)
            found.append({"name": name, "direction": direction} | split)
    return found


def _run(fused: FusedCall, direction: Direction) -> Callable[[], Any]:
    """Call the op as compiled code does in a training step."""
    text = str(fused.call)
    if direction == "forward":
        return lambda: op.QLORA_LINEAR(fused.x, fused.tensors, None, text)
    backward = torch.no_grad()(op.QLORA_LINEAR_BACKWARD)
    return lambda: backward(fused.grads, fused.x, fused.tensors, None, text)


def _split(fused: FusedCall, direction: Direction, repeats: int) -> dict[str, Any]:
    call, x, tensors, text = fused.call, fused.x, fused.tensors, str(fused.call)
    run = _run(fused, direction)
    low = torch.empty(ROWS, call.rank) if direction == "forward" else tensors[-1]

    def chosen() -> tuple[Any, Any]:
        group = bound(Call.parse(text), x.reshape(-1, call.k), tensors, None, low)
        problem = problem_of(call, direction, ROWS, x)
        choice = select(problem, call.records)
        with selector_named(call.records).timing(problem, choice, ROWS):
            return group, choice

    group, choice = chosen()

    def solve() -> Any:
        if direction == "forward":
            return choice.variant.forward_group(group, choice.config)
        return choice.variant.backward_group(fused.grads, group, call.needs, choice.config)

    def solve_recorded() -> Any:
        with torch.no_grad(), recording():
            return solve()

    def compute() -> Any:
        if direction == "forward":
            return op._forward(x, tensors, None, text)
        return op._backward(fused.grads, x, tensors, None, text)

    outside, inside = torch_launches(run)
    torchs = sum((outside + inside).values())
    with torch.no_grad(), recording() as launches:
        solve()
    parts = [run, torch.no_grad()(compute), chosen, solve_recorded]
    parts.append(lambda: [each.run() for each in launches])
    whole, inner, front, body, started = least(parts, repeats)
    charged = 1e6 * LAUNCH_SECONDS * torchs
    split = (whole - inner, front, body + charged, started, inner - front - body - started)
    return {
        "choice": choice.name,
        "triton": len(launches),
        "torch": torchs,
        "whole": whole + charged,
        "layers": dict(zip(LAYERS, split, strict=True)),
    }


def least(runs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the least CPU time of each in microseconds, in turn, as other work comes in bursts."""
    batch = 20
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + repeats):
        for run, times in zip(runs, taken, strict=True):
            start = time.thread_time()
            for _ in range(batch):
                run()
            times.append((time.thread_time() - start) / batch)
    return [1e6 * min(times[1:]) for times in taken]
