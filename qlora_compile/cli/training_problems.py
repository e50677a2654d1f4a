"""The Problems that training poses for given shapes, without a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from qlora_compile.cli.shapes import Shape
from qlora_compile.kernels.formats.formats import format_written
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem, bucket_rows
from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.kernels.selection import problems_of_call

COMPUTE_DTYPE = torch.bfloat16


def problems_of_shapes(
    shapes: Iterable[Shape],
    format: str,
    *,
    dropout: bool,
    device: str = "cuda",
    dtype: torch.dtype = COMPUTE_DTYPE,
) -> list[Problem]:
    """Return the Problems of each shape, each once.

    They are those of a model of `dtype` without biases, with weights in `format` as `optimize`
    packs them, and adapters in float32 as PEFT keeps them.
    """
    problems: dict[Problem, None] = {}
    for m, n, k, rank in shapes:
        single = Problem(
            direction="forward",
            m=bucket_rows(m),
            layout=_layout(format, n[0], k),
            rank=rank,
            x_dtype=dtype,
            compute_dtype=dtype,
            lora_dtype=torch.float32 if rank else dtype,
            out_dtype=dtype,
            bias=False,
            dropout=dropout and rank > 0,
            keeps_low_rank=False,
            device=device,
        )
        forward = Problem.of_group(
            [replace(single, layout=single.layout.with_rows(each)) for each in n]
        )
        problems |= dict.fromkeys(problems_of_call(forward, trains=True))
    return list(problems)


def _layout(format: str, n: int, k: int) -> Layout:
    if format == UNQUANTIZED:
        return Layout(UNQUANTIZED, (n, k))
    name, options = format_written(format)
    return format_named(name).usual_layout((n, k), **options)
