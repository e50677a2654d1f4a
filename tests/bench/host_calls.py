"""Measures one fused call on an imaginary GPU, and prints JSON.

It runs in a separate process, as the tests' may have its kernels decorated for Triton's
interpreter.
"""

from __future__ import annotations

import json

from bench.host.calls import measured_calls
from tests.fake_device.device import fake_device


def main() -> None:
    with fake_device() as device:
        before = device.launched
        found = measured_calls(1, ["o"])
        print(json.dumps({"calls": found, "launched": device.launched - before}))


if __name__ == "__main__":
    main()
