"""Runs the Triton variants through Triton's JIT for an imaginary GPU, and counts which of their
kernels its cache, $TRITON_CACHE_DIR, knew.

    python -m tests.cli.built_kernels_found sm_90 256x256x512x16 129 256 0.1

The arguments are a target, shapes, the first and the last of the row counts that replace the
shapes' M, and a dropout probability. Operands are real ones on the CPU. Only what touches a device
is missing: nothing is loaded, launched or computed. It runs in a separate process, because the
tests' process may interpret its kernels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from qlora_compile.cli.shapes import parse_shapes
from qlora_compile.cli.training_problems import problems_of_shapes
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.kernels.gpu.target import assuming
from qlora_compile.kernels.problem import bucket_rows
from qlora_compile.kernels.registry import VARIANTS
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from qlora_compile.tuning.operands import operands


class FakeUtils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20, "warpSize": 32, "multiprocessor_count": 132}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and most threads."""
        return 1, 2, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class FakeDriver:
    """The driver of a device of `target` that notes launches in `launched`."""

    def __init__(self, target: GPUTarget, launched: list[Any]) -> None:
        self.target = target
        self.launched = launched
        self.utils = FakeUtils()

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(metadata.name)


def main(arch: str, shapes: str, first: str, last: str, dropout: str) -> None:
    launched: list[Any] = []
    found: list[tuple[str, bool]] = []

    def listener(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        found.append((metadata["name"], cache_hit))

    driver.set_active(FakeDriver(TARGETS[arch], launched))  # pyright: ignore[reportArgumentType]
    knobs.compilation.listener = listener
    for problem in problems_of_shapes(parse_shapes(shapes), "nf4", dropout=float(dropout) > 0):
        for m in range(int(first), int(last) + 1):
            asked = replace(problem, m=bucket_rows(m))
            made = operands(replace(problem, m=m, device="cpu"))
            for variant in VARIANTS:
                if isinstance(variant, TritonVariant) and not variant.rejects_on(arch, asked):
                    for config in variant.configs_on(arch, asked):
                        with assuming(arch, kind="cpu"):
                            made.run(variant, config)
    misses = [name for name, hit in found if not hit]
    print(json.dumps({"launches": len(launched), "kernels": len(found), "misses": misses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
