"""The process that compares plans with launches from Python: bits, and the host's time.

A line of JSON with a format is answered with the calls of that format whose results differ, the
number of replayed plans, and the microseconds of one call, forward and backward, either way. On a
CPU, which has no plans, both ways are the same, and none is timed.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bench.peers.answers import answers
from qlora_compile.kernels.call import Call, LinearCall
from qlora_compile.kernels.experts.op import QLORA_EXPERTS
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.op import QLORA_LINEAR
from qlora_compile.kernels.plans import native

RANK, DROPOUT, EXPERTS, REPEATS = 16, 0.1, 4, 30
ROWS = {"cuda": (2048, 129), "cpu": (16,)}
SHAPE: dict[str, tuple[int, tuple[int, ...]]] = {
    "cuda": (2048, (2048, 512, 512)),
    "cpu": (64, (64, 32, 32)),
}
"""K, and N of q, k and v: of Llama-3.2-1B on a GPU."""


@dataclass(frozen=True)
class FusedCall:
    """One fused call. tensors: the op's; leaves: those whose gradients are computed."""

    name: str
    op: Any
    call: Call
    x: Tensor
    tensors: list[Tensor]
    leaves: list[Tensor]
    seed: Tensor | None = None

    def run(self) -> list[Tensor]:
        """Return every y and every gradient."""
        results = self.op(self.x, self.tensors, self.seed, str(self.call))
        ys = results[: len(self.call.linears)]
        grads = torch.autograd.grad(ys, self.leaves, [torch.ones_like(y) for y in ys])
        return [*(y.detach() for y in ys), *grads]


def fused_calls(format: str, device: str) -> Iterator[FusedCall]:
    """Yield calls of one Linear and of siblings, with and without dropout, then of experts."""
    k, widths = SHAPE[device]
    for rows in ROWS[device]:
        for columns in (widths, widths[:1]):
            for dropout in (0.0, DROPOUT):
                name = f"{rows}x{'+'.join(map(str, columns))}x{k} dropout {dropout}"
                yield _linears(name, format, rows, columns, k, dropout, device)
        yield _experts(f"{rows} rows of {EXPERTS} experts", format, rows, widths[-1], k, device)


def _linears(
    name: str, format: str, rows: int, columns: tuple[int, ...], k: int, dropout: float, device: str
) -> FusedCall:
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16).requires_grad_()
    linears: list[LinearCall] = []
    tensors: list[Tensor] = []
    leaves = [x]
    for n in columns:
        packed = format_named(format).quantize(torch.randn(n, k, device=device) * k**-0.5)
        linears.append(LinearCall(packed.layout, rank=RANK, stream=len(linears)))
        factors = [
            torch.randn(RANK, k, device=device).mul_(k**-0.5).requires_grad_(),
            torch.randn(n, RANK, device=device).requires_grad_(),
        ]
        tensors += [*packed.tensors, *factors, torch.ones(1, device=device)]
        leaves += factors
    dtypes = (x.dtype, torch.float32, x.dtype)
    call = Call(tuple(linears), *dtypes, dropout=dropout, save_low_rank=True)
    seed = torch.tensor([1234], device=device) if dropout else None
    return FusedCall(name, QLORA_LINEAR, call, x, tensors, leaves, seed)


def _experts(name: str, format: str, rows: int, n: int, k: int, device: str) -> FusedCall:
    x = torch.randn(rows, k, device=device, dtype=torch.bfloat16).requires_grad_()
    packed = format_named(format).quantize(torch.randn(EXPERTS * n, k, device=device) * k**-0.5)
    factors = [
        torch.randn(EXPERTS, RANK, k, device=device).mul_(k**-0.5).requires_grad_(),
        torch.randn(EXPERTS, n, RANK, device=device).requires_grad_(),
    ]
    ends = [rows * (each + 1) // EXPERTS for each in range(EXPERTS)]
    offsets = torch.tensor(ends, dtype=torch.int32, device=device)
    linear = LinearCall(packed.layout, rank=RANK)
    call = Call((linear,), x.dtype, x.dtype, x.dtype, experts=EXPERTS)
    tensors = [offsets, *packed.tensors, *factors, torch.ones(1, device=device)]
    return FusedCall(name, QLORA_EXPERTS, call, x, tensors, [x, *factors])


def compared(format: str, device: str) -> dict[str, Any]:
    different: list[str] = []
    calls = list(fused_calls(format, device))
    microseconds: dict[str, float] = {}
    for call in calls:
        with native.off():
            expected = call.run()
        # The second of these records, and the last two replay.
        for _ in range(4):
            found = call.run()
            if not all(map(torch.equal, found, expected)):
                different.append(call.name)
                break
    if device == "cuda":
        # A batch of the size that most people train with: launches from Python take longer.
        small = replace(calls[0], name="small")
        microseconds = {
            "plans": _microseconds(small, plans=True),
            "Python": _microseconds(small, plans=False),
        }
    plans = torch.ops.qlora_plans.counts()[0] if device == "cuda" else 0
    return {
        "calls": len(calls),
        "different": different,
        "plans": plans,
        "by Python": native.report(),
        "microseconds": microseconds,
    }


def _microseconds(call: FusedCall, *, plans: bool) -> float:
    """Return microseconds of the wall clock per call, at least the device's."""
    with nullcontext() if plans else native.off():
        for _ in range(3):
            call.run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(REPEATS):
            call.run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / REPEATS * 1e6


def main() -> None:
    results = answers()
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["device"] == "cuda":
            native.install("CUDA")
        print(json.dumps(compared(**asked)), file=results, flush=True)


if __name__ == "__main__":
    main()
