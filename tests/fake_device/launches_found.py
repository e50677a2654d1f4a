"""Prints what the fake device records of a toy kernel's launches as JSON.

It runs in a separate process, as the tests' may have its kernels decorated for Triton's
interpreter.
"""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import torch
import triton
from triton import language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qlora_compile.kernels.gpu.launch import Launch
from tests.fake_device.device import FakeDevice, fake_device


@triton.jit
def toy_kernel(x, pair, out, count, factor, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    first = x.load([tl.program_id(0), 0]).reshape(SIZE)
    tl.store(out + at, (first + pair[1]) * factor, mask=at < count)


def find(device: FakeDevice) -> dict[str, Any]:
    x, other, out = torch.ones(48), torch.ones(16), torch.ones(48)
    descriptor = TensorDescriptor(x, [3, 16], [16, 1], [1, 16])
    arguments = {"x": descriptor, "pair": (other, 7), "out": out, "count": 40, "factor": 2.5}
    launch = Launch(toy_kernel, (3,), arguments, {"SIZE": 16}, num_warps=2)
    with device.recording() as launches:
        launch.run()
        launch.run()
    same = launches[0] == launches[1]
    with device.recording() as none:
        pass
    (noted, _), pointers = launches, [t.data_ptr() for t in (x, other, out)]
    device.charge(1e-3)
    start = time.perf_counter()
    launch.run()
    charged = time.perf_counter() - start
    device.charge(0)
    device.fail(719, after=1)
    launch.run()
    try:
        launch.run()
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    launch.run()
    sizes = [len(each) for each in noted.parameters]
    told = [struct.unpack("<Q", each)[0] for each in noted.parameters if len(each) == 8]
    return {
        "kernel": noted.kernel,
        "grid": noted.grid,
        "block": noted.block,
        "sizes": sizes,
        "map": int.from_bytes(noted.parameters[0][:8], "little") == pointers[0],
        "pointers": [each in told for each in pointers[1:]],
        "numbers": [struct.pack("<i", 7), struct.pack("<i", 40), struct.pack("<f", 2.5)]
        == [each for each in noted.parameters[-7:] if len(each) == 4][-3:],
        "same": same,
        "none": len(none),
        "charged": charged,
        "error": error,
        "launched": device.launched,
        "loaded": device.loaded,
        "written": out.tolist() != [1.0] * 48,
    }


if __name__ == "__main__":
    with fake_device("sm_90") as found:
        print(json.dumps(find(found)))
