"""Prints the figures of one shipped launch of every kernel on one target as JSON.

python -m tests.bench.shipped_subset sm_90
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import torch

from bench.static.figures import figures
from bench.static.launches import ShippedLaunch
from bench.static.shipped import STREAMS, launches
from qlora_compile.kernels.call import NeedsGradient
from qlora_compile.kernels.experts.base import ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.grouped import grouped_config
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named, meta_tensors
from qlora_compile.kernels.gpu.grouped_launch import grouped_backward, grouped_forward
from qlora_compile.kernels.gpu.launch import Launch, recording
from qlora_compile.kernels.layout import Layout

KERNELS = (
    *("fused_forward", "fused_backward", "tail_forward", "tail_backward", "dequantize"),
    *("low_rank", "adapter_operand", "adapter_gradient", "add_up", "skinny"),
)
EXPERTS = ("low", "forward", "low gradient", "low", "dA", "dB", "backward")
"""The experts' launches of a forward and a backward, in their order; the second "low" is the first
recomputed."""
GROUPED_FORMATS = {"sm_80": "int4", "sm_90": "uint8", "gfx942": "nvfp4"}
"""By target, the format in groups whose product is among the launches; `make bench-static` compiles
all of them."""
E, N, K = 8, 1024, 2048
RANK = 16


def usual(arch: str) -> list[ShippedLaunch]:
    """Return a launch of each of KERNELS, of the usual kind if there is one, and one of a format in
    groups."""
    chosen: dict[str, ShippedLaunch] = {}
    for shipped in launches(arch):
        kernel = shipped.kernel
        if kernel in KERNELS and (kernel not in chosen or _usual(shipped) > _usual(chosen[kernel])):
            chosen[kernel] = shipped
    of_groups = next(
        each
        for each in launches(arch)
        if each.kernel == "fused_forward" and each.case.format == GROUPED_FORMATS[arch]
    )
    return [*chosen.values(), of_groups]


def _usual(shipped: ShippedLaunch) -> int:
    """Return how many of the properties of a usual QLoRA layer the launch has."""
    case = shipped.case
    siblings = "siblings" in case.note
    return sum((case.dtype == torch.bfloat16, case.format == "nf4", case.rank == RANK, siblings))


def experts(arch: str) -> Iterator[tuple[str, Launch]]:
    """Yield every kernel of the experts, and their products from other formats and for fewer
    rows."""
    products = ("forward", "backward")
    yield from _experts(arch, 128, "nf4", EXPERTS)
    yield from _experts(arch, 128, UNQUANTIZED, products)
    yield from _experts(arch, 4, "nf4", products)
    yield from _experts(arch, 128, "int8", products[:1])


def _experts(
    arch: str, rows: int, format: str, names: tuple[str, ...]
) -> Iterator[tuple[str, Launch]]:
    """Yield those of `names` with `rows` for each expert."""
    bf16 = torch.bfloat16

    def meta(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    planes, layout = [meta(E, N, K)], Layout(UNQUANTIZED, (E * N, K))
    if format != UNQUANTIZED:
        layout = format_named(format).layout((E * N, K))
        planes = meta_tensors(layout, bf16)
    tensors = ExpertsTensors(
        x=meta(rows * E, K),
        offsets=meta(E, dtype=torch.int32),
        planes=planes,
        bias=meta(E, N),
        lora_a=meta(E, RANK, K, dtype=torch.float32),
        lora_b=meta(E, N, RANK, dtype=torch.float32),
        scaling=meta(1, dtype=torch.float32),
        seed=None,
    )
    spec = ExpertsSpec(layout, 0.0, 0, bf16, bf16, bf16, experts=E)
    config = grouped_config(arch, rows * E, E, RANK, layout)
    with recording() as recorded:
        grouped_forward(tensors, spec, config)
        grouped_backward(meta(rows * E, N), tensors, spec, config, NeedsGradient(True, True))
    for name, launch in zip(EXPERTS, recorded, strict=True):
        if name in names:
            yield f"experts {name}", launch


def main(arch: str) -> None:
    chosen = [(shipped.kernel, shipped.launch) for shipped in usual(arch)]
    found = [
        {"kernel": kernel} | dataclasses.asdict(figures(launch, arch, streams=kernel in STREAMS))
        for kernel, launch in [*chosen, *experts(arch)]
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
