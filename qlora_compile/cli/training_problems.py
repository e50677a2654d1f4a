"""The Problems that training poses, of shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from qlora_compile.cli.shapes import Shape
from qlora_compile.kernels.problem import Problem, bucket_rows
from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.kernels.selection import problems_of_call

COMPUTE_DTYPE = torch.bfloat16
BLOCK_SIZE = 64


def problems_of_shapes(
    shapes: Iterable[Shape],
    format: str,
    *,
    dropout: bool,
    device: str = "cuda",
    dtype: torch.dtype = COMPUTE_DTYPE,
) -> list[Problem]:
    """Those of each shape: a model of `dtype` without biases, weights in `format` as
    `optimize` packs them, adapters in float32 as PEFT keeps them."""
    double = format != UNQUANTIZED and format_named(format).has_double_quantize
    problems: dict[Problem, None] = {}
    for m, n, k, rank in shapes:
        single = Problem(
            direction="forward",
            m=bucket_rows(m),
            n=n[0],
            k=k,
            rank=rank,
            format=format,
            block_size=0 if format == UNQUANTIZED else BLOCK_SIZE,
            double_quantized=double,
            x_dtype=dtype,
            compute_dtype=dtype,
            lora_dtype=torch.float32 if rank else dtype,
            out_dtype=dtype,
            bias=False,
            dropout=dropout and rank > 0,
            keeps_low_rank=False,
            device=device,
        )
        forward = Problem.of_group([replace(single, n=each) for each in n])
        problems |= dict.fromkeys(problems_of_call(forward, trains=True))
    return list(problems)
