"""Prints as JSON how often Triton's JIT is asked for launches of one kernel, and whether launches
of a compiled kernel pass what the JIT passes.

It runs in a separate process, as the tests' may have its kernels decorated for Triton's
interpreter. The device is imaginary, see built_kernels_found.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.gpu.adapter_operands import AdapterFactors, adapter_operands
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.kernels.gpu.products import dequantize
from qlora_compile.kernels.gpu.thin_products import low_rank
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.variants.base import LinearSpec
from tests.cli.built_kernels_found import FakeDriver


class RecordingDriver(FakeDriver):
    """Keeps what each launch was given."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(arguments)


def told(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{argument.dtype} {list(argument.shape)} {argument.stride()}"
    if isinstance(argument, tuple):
        return str([told(each) for each in argument])
    # What Triton tells its hooks is an object of each launch.
    return repr(argument) if type(argument) in (int, float, str) else str(type(argument))


def packed_calls() -> dict[str, Callable[[], Any]]:
    """Return calls with a packed weight, whose planes but one are a tuple, and some others."""

    def call(tensors: Sequence[Tensor], layout: Layout) -> Callable[[], Any]:
        spec = LinearSpec(layout, 0.0, 0, *(torch.bfloat16,) * 3)
        return partial(dequantize, tensors, spec, torch.bfloat16, "prmt")

    quant_format = FORMATS[0]
    weight = torch.randn(32, 256)
    single = quant_format.quantize(weight)
    double = quant_format.pack(weight, quant_format.usual_layout((32, 256)))
    codes, scales = single.tensors
    unaligned = torch.cat([scales[:1], scales])[1:]
    return {
        "packed": call(single.tensors, single.layout),
        "packed again": call([codes.clone(), scales.clone()], single.layout),
        "packed unaligned": call([codes, unaligned], single.layout),
        "doubly quantised": call(double.tensors, double.layout),
    }


def main() -> None:
    launched: list[Any] = []
    driver.set_active(RecordingDriver(TARGETS["sm_90"], launched))  # pyright: ignore[reportArgumentType]
    asked = []
    jit_run = JITFunction.run

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(self)
        return jit_run(self, *arguments, **options)

    JITFunction.run = counted
    x, factor = torch.randn(64, 129).bfloat16(), torch.randn(16, 128)
    low, scaling = torch.randn(1, 64, 16), torch.ones(1)
    factors = [AdapterFactors(low, factor.t(), scaling)]
    operands = partial(adapter_operands, factors, torch.float32, torch.bfloat16)
    calls = {
        "first": partial(low_rank, x[:, :128].contiguous(), factor, torch.float32),
        "again": partial(low_rank, x[:, :128].contiguous(), factor.clone(), torch.float32),
        "one row": partial(low_rank, x[:1, :128].contiguous(), factor, torch.float32),
        "unaligned": partial(low_rank, x[:, 1:], factor, torch.float32),
        "16-bit factor": partial(
            low_rank, x[:, :128].contiguous(), factor.bfloat16(), torch.float32
        ),
        "16-bit product": partial(low_rank, x[:, :128].contiguous(), factor, torch.bfloat16),
        "bits": partial(
            low_rank,
            *(x[:, :128].contiguous(), factor, torch.float32, torch.zeros(1024).byte()),
        ),
        "scaled": partial(operands, factor=1.25),
        "another number": partial(operands, factor=1.5),
        **packed_calls(),
    }
    counts = {}
    for name, call in calls.items():
        before = len(asked)
        call()
        counts[name] = len(asked) - before
    names = list(calls)
    same = all(
        [told(each) for each in launched[names.index(first)]]
        == [told(each) for each in launched[names.index(again)]]
        for first, again in (("first", "again"), ("packed", "packed again"))
    )
    print(json.dumps({"asked": counts, "launched": len(launched), "same": same}))


if __name__ == "__main__":
    main()
