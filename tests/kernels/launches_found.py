"""How often Triton's JIT is asked for launches of one kernel, and whether those that find it
compiled pass what the JIT passes, as JSON on standard output.

A process of its own: the tests' may have its kernels decorated for Triton's interpreter. The device
is not there, see built_kernels_found.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.kernels.gpu.products import low_rank
from tests.cli.built_kernels_found import FakeDriver


class RecordingDriver(FakeDriver):
    """Keeps what each launch was given."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: self.launched.append(arguments)


def told(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"{argument.dtype} {list(argument.shape)} {argument.stride()}"
    # What Triton tells its hooks is an object of each launch.
    return repr(argument) if type(argument) in (int, float, str, tuple) else str(type(argument))


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
    calls = {
        "first": (x[:, :128].contiguous(), factor, torch.float32, 2.0),
        "again": (x[:, :128].contiguous(), factor.clone(), torch.float32, 2.0),
        "another scaling": (x[:, :128].contiguous(), factor, torch.float32, 3.0),
        "one row": (x[:1, :128].contiguous(), factor, torch.float32, 2.0),
        "unaligned": (x[:, 1:], factor, torch.float32, 2.0),
        "16-bit factor": (x[:, :128].contiguous(), factor.bfloat16(), torch.float32, 2.0),
        "16-bit product": (x[:, :128].contiguous(), factor, torch.bfloat16, 2.0),
        "bits": (x[:, :128].contiguous(), factor, torch.float32, 2.0, torch.zeros(1024).byte()),
    }
    counts = {}
    for name, arguments in calls.items():
        before = len(asked)
        low_rank(*arguments)
        counts[name] = len(asked) - before
    first, again = ([told(each) for each in launch] for launch in launched[:2])
    print(json.dumps({"asked": counts, "launched": len(launched), "same": first == again}))


if __name__ == "__main__":
    main()
