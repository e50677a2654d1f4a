"""What the binaries of the experts' products hold on one architecture, as JSON on standard output.

A process of its own: the tests' may have its kernels decorated for Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import torch
from torch import Tensor

from bench.static.figures import figures
from qlora_compile.kernels.experts.base import ExpertsSpec, ExpertsTensors
from qlora_compile.kernels.experts.grouped import grouped_config
from qlora_compile.kernels.formats.formats import UNQUANTIZED, format_named
from qlora_compile.kernels.gpu.grouped_launch import grouped_backward, grouped_forward
from qlora_compile.kernels.gpu.launch import Launch, recording

E, N, K = 8, 1024, 2048
BF16 = torch.bfloat16
LAUNCHES = ("low", "forward", "low gradient", "low", "dA", "dB", "backward")


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(arch: str, rows: int, format: str, rank: int) -> dict[str, Launch]:
    """Of forward and backward with `rows` for each expert."""
    config = grouped_config(arch, rows * E, E, rank, format)
    quantized = None if format == UNQUANTIZED else format_named(format)
    planes = [meta(E, N, K)]
    if quantized is not None:
        codes = meta(E * N * K * quantized.bits // 8, dtype=torch.uint8)
        planes = [codes, meta(E * N * K // 64, dtype=torch.float32)]
    tensors = ExpertsTensors(
        x=meta(rows * E, K),
        offsets=meta(E, dtype=torch.int32),
        planes=planes,
        bias=meta(E, N),
        lora_a=meta(E, rank, K, dtype=torch.float32),
        lora_b=meta(E, N, rank, dtype=torch.float32),
    )
    spec = ExpertsSpec(quantized, N, K, 64, 2.0, BF16, BF16)
    with recording() as recorded:
        grouped_forward(tensors, spec, config)
        grouped_backward(meta(rows * E, N), tensors, spec, config, needs_x=True, needs_adapter=True)
    return dict(zip(LAUNCHES, recorded, strict=True))


def main(arch: str) -> None:
    found = []
    for rows, format, names in (
        (128, "nf4", LAUNCHES),
        (128, UNQUANTIZED, ("forward", "backward")),
        (4, "nf4", ("forward", "backward")),
        (128, "int8", ("forward",)),
    ):
        for name, launch in launches(arch, rows, format, 16).items():
            if name in names:
                record = dataclasses.asdict(figures(launch, arch))
                found.append({"rows": rows, "format": format, "launch": name} | record)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
