"""Every variant on this machine's GPU beside what users run today, forward and backward.

Candidates of one layer run in turn, over rotated inputs that do not fit the second-level cache, and
are timed by events, without the time that launching them takes; the table gives medians and the
ratio to dequantise + vendor GEMM + LoRA. Peers that are not installed are named as such. Needs a
CUDA or ROCm device.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qlora_compile.kernels.formats.formats import format_named
from qlora_compile.kernels.linear_call import linear_problem
from qlora_compile.kernels.packed import PackedWeight
from qlora_compile.kernels.problem import Direction
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.variants.base import LinearSpec, LinearTensors, NeedsGradient
from qlora_compile.tuning.measure import device_seconds

RESULTS = Path(__file__).parent / "results"
BASELINE = "dequantise + vendor GEMM + LoRA"
SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096), (4096, 14336))
ROTATED_BYTES = 512 * 2**20
"""More than any second-level cache: each run finds its operands in memory."""

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
    def spec(self) -> LinearSpec:
        dtypes = (self.x.dtype, self.lora_a.dtype, self.x.dtype)
        return LinearSpec(self.packed.layout, 0.0, 0, *dtypes)

    @property
    def tensors(self) -> LinearTensors:
        scaling = torch.full((1,), 2.0, device=self.x.device)
        adapter = (self.lora_a, self.lora_b, scaling)
        return LinearTensors(self.x, self.packed.tensors, None, *adapter, None)


def layer(rows: int, n: int, k: int, rank: int, format: str, dtype: torch.dtype) -> Layer:
    weight = torch.randn(n, k, device="cuda") * k**-0.5
    double = format_named(format).has_double_quantize
    return Layer(
        x=torch.randn(rows, k, device="cuda", dtype=dtype),
        grad=torch.randn(rows, n, device="cuda", dtype=dtype),
        packed=format_named(format).quantize(weight, double_quantize=double),
        lora_a=torch.randn(rank, k, device="cuda") * k**-0.5,
        lora_b=torch.randn(n, rank, device="cuda") * rank**-0.5,
    )


def ours(layer: Layer, direction: Direction) -> Iterator[tuple[str, Run]]:
    """Each variant with each of its configs for this device."""
    tensors, spec, grad = layer.tensors, layer.spec, layer.grad
    problem = linear_problem(direction, layer.x.shape[0], tensors, spec)
    needs = NeedsGradient(True, True, False)
    for variant in VARIANTS:
        if variant.rejects(problem):
            continue
        for config in variant.configs(problem):
            name = f"{variant.name} {config.label}".removesuffix(" -")
            if direction == "forward":
                yield name, lambda v=variant, c=config: v.forward(tensors, spec, c)
            else:
                yield name, lambda v=variant, c=config: v.backward(grad, tensors, spec, needs, c)


def autograd(run: Callable[[Tensor, Tensor, Tensor], Tensor], layer: Layer, direction: str) -> Run:
    """`run(x, lora_a, lora_b)`, or its backward alone."""
    leaves = [t.detach().requires_grad_() for t in (layer.x, layer.lora_a, layer.lora_b)]
    if direction == "forward":
        return lambda: run(*leaves)
    y = run(*leaves)
    return lambda: torch.autograd.grad(y, leaves, layer.grad, retain_graph=True)


def plain_lora(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """PEFT's branch: in the adapters' dtype."""
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


def unsloth_peer(layer: Layer, direction: str) -> Run:
    from bitsandbytes.functional import quantize_4bit
    from unsloth.kernels.fast_lora import LoRA_W  # pyright: ignore[reportMissingImports]

    weight = layer.spec.dequantize(layer.packed.tensors, layer.x.dtype)
    codes, state = quantize_4bit(weight, quant_type=layer.packed.format, compress_statistics=True)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LoRA_W.apply(x[None], codes, state, a, b, 2.0)[0]

    return autograd(run, layer, direction)


PEERS: tuple[tuple[str, str | None, Callable[[Layer, str], Run]], ...] = (
    (BASELINE, None, dense_peer),
    ("PEFT over bitsandbytes", "bitsandbytes", bitsandbytes_peer),
    ("Unsloth", "unsloth", unsloth_peer),
)
"""Name, the package it needs, and what runs it; over 4-bit formats."""


def milliseconds(candidates: dict[str, list[Run]], repeats: int) -> dict[str, float]:
    """The median of `repeats` timings of each; one of each in turn, over its rotated inputs."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for runs in candidates.values():
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    for index in range(repeats):
        for name, runs in candidates.items():
            times[name].append(1e3 * device_seconds(runs[index % len(runs)]))
    return {name: statistics.median(values) for name, values in times.items()}


def main(
    rows: Annotated[list[int] | None, typer.Option(help="Rows of x; again for more.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    format: Annotated[str, typer.Option(help="How the weight is packed.")] = "nf4",
    repeats: Annotated[int, typer.Option(help="Timings of each candidate.")] = 30,
) -> None:
    """Measure every variant against its peers; writes bench/results/gpu.json."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("bench.gpu needs a CUDA or ROCm device, and torch sees none")
        raise typer.Exit(2)
    peers = [p for p in PEERS if p[1] is None or importlib.util.find_spec(p[1])]
    for name, package, _ in PEERS:
        if package is not None and not importlib.util.find_spec(package):
            console.print(f"{name} is left out: {package} is not installed")
    results = []
    for m in rows or [1, 16, 512, 4096, 16384]:
        for n, k in SHAPES:
            moved = 2 * m * (n + k) + n * k
            copies = [
                layer(m, n, k, rank, format, torch.bfloat16)
                for _ in range(max(2, min(8, ROTATED_BYTES // moved)))
            ]
            for direction in ("forward", "backward"):
                candidates = {
                    name: [make(each, direction) for each in copies] for name, _, make in peers
                }
                for each in copies:
                    for name, run in ours(each, direction):
                        candidates.setdefault(name, []).append(run)
                medians = milliseconds(candidates, repeats)
                table = Table("", "ms", f"of {BASELINE}", title=f"{direction} M={m} N={n} K={k}")
                for name, value in sorted(medians.items(), key=lambda item: item[1]):
                    table.add_row(name, f"{value:.3f}", f"{value / medians[BASELINE]:.3f}")
                console.print(table)
                results.append({"m": m, "n": n, "k": k, "direction": direction, "ms": medians})
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name()
    figures = {"device": device, "torch": torch.__version__, "rank": rank, "results": results}
    (RESULTS / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
