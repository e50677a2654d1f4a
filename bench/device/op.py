"""The process that measures the fused op alone: every variant beside what users run today.

Candidates of one layer run in turn, over rotated inputs that do not fit the second-level cache, and
are timed by events, without the time of launching. A line of JSON with a problem is answered with
the median of each candidate. On a CPU every candidate runs, and none is timed. Unsloth is not among
them, because importing it changes what the others run.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peers.answers import answers
from qlora_compile.kernels.call import Call, LinearCall, NeedsGradient
from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.linear_call import problem_of, specs
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.variants.base import LinearSpec, LinearTensors
from qlora_compile.tuning.measure import device_seconds

BASELINE = "dequantise + vendor GEMM + LoRA"
RANK, FORMAT, REPEATS = 16, "nf4", 30
ROTATED_BYTES = 512 * 2**20
"""Bytes, more than any second-level cache, so that each run finds its operands in memory."""

Run = Callable[[], Any]


@dataclass(frozen=True)
class Layer:
    """One layer's operands: x [M, K], dY [M, N], W packed, adapters of `rank` in float32."""

    x: Tensor
    grad: Tensor
    packed: PackedWeight
    lora_a: Tensor
    lora_b: Tensor

    @property
    def call(self) -> Call:
        dtypes = (self.x.dtype, self.lora_a.dtype, self.x.dtype)
        return Call((LinearCall(self.packed.layout, rank=RANK),), *dtypes)

    @property
    def spec(self) -> LinearSpec:
        (spec,) = specs(self.call)
        return spec

    @property
    def tensors(self) -> LinearTensors:
        scaling = torch.full((1,), 2.0, device=self.x.device)
        adapter = (self.lora_a, self.lora_b, scaling)
        return LinearTensors(self.x, self.packed.tensors, None, *adapter, None)


def layer(rows: int, n: int, k: int, device: str) -> Layer:
    normal = partial(torch.randn, device=device)
    return Layer(
        x=normal(rows, k, dtype=torch.bfloat16),
        grad=normal(rows, n, dtype=torch.bfloat16),
        packed=format_named(FORMAT).quantize(normal(n, k) * k**-0.5, double_quantize=True),
        lora_a=normal(RANK, k) * k**-0.5,
        lora_b=normal(n, RANK) * RANK**-0.5,
    )


def ours(layer: Layer, direction: Direction) -> Iterator[tuple[str, Run]]:
    """Each variant with each of its configs for this device."""
    group, grad = [(layer.tensors, layer.spec)], layer.grad
    problem = problem_of(layer.call, direction, layer.x.shape[0], layer.x)
    needs = NeedsGradient(True, True, False)
    for variant in VARIANTS:
        if variant.rejects(problem):
            continue
        for config in variant.configs(problem):
            name = f"{variant.name} {config.label}".removesuffix(" -")
            if direction == "forward":
                yield name, lambda v=variant, c=config: v.forward_group(group, c)
            else:
                yield name, lambda v=variant, c=config: v.backward_group([grad], group, needs, c)


def autograd(run: Callable[[Tensor, Tensor, Tensor], Tensor], layer: Layer, direction: str) -> Run:
    """Return a function that calls `run(x, lora_a, lora_b)`, or does only its backward."""
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.lora_a, layer.lora_b)]
    if direction == "forward":
        return lambda: run(*leaves)
    y = run(*leaves)
    return lambda: torch.autograd.grad(y, leaves, layer.grad, retain_graph=True)


def plain_lora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute PEFT's branch, in the adapters' dtype."""
    return (x.to(a.dtype) @ a.t() @ b.t()) * 2.0


def dense_peer(layer: Layer, direction: str) -> Run:
    spec = layer.spec

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        weight = spec.dequantize(layer.packed.tensors, x.dtype)
        return x @ weight.t() + plain_lora(x, a, b).to(x.dtype)

    return autograd(run, layer, direction)


def bitsandbytes_peer(layer: Layer, direction: str) -> Run:
    import bitsandbytes as bnb
    from bitsandbytes.functional import quantize_4bit

    weight = layer.spec.dequantize(layer.packed.tensors, layer.x.dtype)
    codes, state = quantize_4bit(weight, quant_type=layer.packed.format, compress_statistics=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = bnb.matmul_4bit(x, codes.t(), quant_state=state)
        return y + plain_lora(x, a, b).to(x.dtype)

    return autograd(run, layer, direction)


PEERS: tuple[tuple[str, str | None, Callable[[Layer, str], Run]], ...] = (
    (BASELINE, None, dense_peer),
    ("PEFT over bitsandbytes", "bitsandbytes", bitsandbytes_peer),
)
"""Name, the package it needs, and what runs it; over 4-bit formats."""


def milliseconds(candidates: dict[str, list[Run]], repeats: int) -> dict[str, float]:
    """Return the median of `repeats` timings of each candidate, in turn, over rotated inputs."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for runs in candidates.values():
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    for index in range(repeats):
        for name, runs in candidates.items():
            times[name].append(1e3 * device_seconds(runs[index % len(runs)]))
    return {name: statistics.median(values) for name, values in times.items()}


def measured(m: int, n: int, k: int, direction: Direction, device: str) -> dict[str, float | None]:
    """Return the milliseconds of every candidate by name; None on a CPU, where they only run."""
    rotated = max(2, min(8, ROTATED_BYTES // (2 * m * (n + k) + n * k)))
    copies = [layer(m, n, k, device) for _ in range(rotated if device == "cuda" else 1)]
    candidates: dict[str, list[Run]] = {
        name: [make(each, direction) for each in copies]
        for name, package, make in PEERS
        if package is None or importlib.util.find_spec(package)
    }
    for each in copies:
        for name, run in ours(each, direction):
            candidates.setdefault(name, []).append(run)
    if device == "cuda":
        return dict(milliseconds(candidates, REPEATS))
    for (run,) in candidates.values():
        run()
    return dict.fromkeys(candidates)


def main() -> None:
    results = answers()
    warnings.filterwarnings("ignore")
    for line in sys.stdin:
        print(json.dumps({"ms": measured(**json.loads(line))}), file=results, flush=True)


if __name__ == "__main__":
    main()
