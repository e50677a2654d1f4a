"""Early builds: the C++ of a first step on a CPU, built while `optimize` works on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qlora_compile.errors import QloraCompileError
from qlora_compile.kernels.cpu import background, instructions, thin, toolchain
from qlora_compile.kernels.registry import format_named
from qlora_compile.sites import Inventory
from qlora_compile.tuning import modes

_SAMPLE = (64, 1024)
"""The shape of the least weight that every format packs and decodes by C++."""


def start(
    inventory: Inventory, quantize: str | None, options: Mapping[str, Any], tune: object
) -> None:
    """Have built, in two other threads, what a step of a model on the CPU will call in the model's
    own dtype: packing and decoding in the format `quantize`, adapters, and what the figures of a
    new CPU are measured with. Attention is left to the tracing of a block, which takes long enough.
    options and tune: as `optimize` got them, unchecked."""
    parameters = (p for each in inventory.modules.values() for p in each.parameters(recurse=False))
    weights = (p for p in parameters if p.device.type == "cpu" and p.is_floating_point())
    largest = max(weights, key=Tensor.numel, default=None)
    # Below a cap, which is for tests, a build has settings of its own.
    if largest is None or not toolchain.has_compiler() or instructions.is_capped():
        return
    # Two threads that import Inductor at once may find each other's modules half made.
    from torch._inductor.codecache import torch_key

    # The key is a digest of torch's sources, which all entries of its caches hold.
    builds = chain([torch_key], _builds(largest.dtype, quantize, options, tune))
    background.start(builds, threads=2)


def _builds(
    dtype: torch.dtype, quantize: str | None, options: Mapping[str, Any], tune: object
) -> Iterator[Callable[[], object]]:
    if quantize is not None:
        yield partial(_decode_sample, instructions.product_dtype(dtype), quantize, options)
    yield from thin.builds(dtype)
    yield from modes.builds_for_measuring(tune)


def _decode_sample(dtype: torch.dtype, quantize: str, options: Mapping[str, Any]) -> None:
    """Pack and decode a small weight, by C++ that serves every shape."""
    fmt = format_named(quantize)
    try:
        packed = fmt.quantize(torch.ones(_SAMPLE, device="cpu"), **options)
    except QloraCompileError:  # Groups that do not divide the sample may well divide the weights.
        return
    fmt.dequantize_rows(packed, 0, _SAMPLE[0], dtype)
