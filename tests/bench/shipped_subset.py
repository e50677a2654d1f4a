"""The figures of one shipped launch of every kernel on one target, as JSON on standard output.

python -m tests.bench.shipped_subset sm_90
"""

from __future__ import annotations

import dataclasses
import json
import sys

from bench.static.shipped import ShippedLaunch, launches, measure

KERNELS = (
    *("fused_forward", "fused_backward", "tail_forward", "tail_backward", "dequantize"),
    *("low_rank", "adapter_gradient", "skinny"),
)


def subset(arch: str) -> list[int]:
    """The index of a launch of each of KERNELS: of the usual kind where there is one."""
    chosen: dict[str, tuple[int, int]] = {}
    for index, shipped in enumerate(launches(arch)):
        if shipped.kernel not in KERNELS:
            continue
        score = _usual(shipped)
        if shipped.kernel not in chosen or score > chosen[shipped.kernel][0]:
            chosen[shipped.kernel] = (score, index)
    return [index for _, index in chosen.values()]


def _usual(shipped: ShippedLaunch) -> int:
    """How many of the properties it has that a QLoRA layer usually has."""
    usual = (str(shipped.dtype) == "torch.bfloat16", shipped.format == "nf4", shipped.rank == 16)
    return sum(usual)


if __name__ == "__main__":
    arch = sys.argv[1]
    print(json.dumps([dataclasses.asdict(measure(arch, index)) for index in subset(arch)]))
