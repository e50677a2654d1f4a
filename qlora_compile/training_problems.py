"""The Problems that training on a GPU poses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from qlora_compile.kernels.registry import UNQUANTIZED, format_named
from qlora_compile.problem import Problem, bucket_rows

COMPUTE_DTYPE = torch.bfloat16
BLOCK_SIZE = 64


def problems_of_shapes(
    shapes: Iterable[tuple[int, int, int, int]], format: str, *, dropout: bool
) -> list[Problem]:
    """Those of each (M, N, K, rank): a bfloat16 model without biases, weights in `format` as
    `optimize` packs them, adapters in float32 as PEFT keeps them."""
    double = format != UNQUANTIZED and format_named(format).has_double_quantize
    problems: dict[Problem, None] = {}
    for m, n, k, rank in shapes:
        forward = Problem(
            direction="forward",
            m=bucket_rows(m),
            n=n,
            k=k,
            rank=rank,
            format=format,
            block_size=BLOCK_SIZE,
            double_quantized=double,
            x_dtype=COMPUTE_DTYPE,
            compute_dtype=COMPUTE_DTYPE,
            lora_dtype=torch.float32 if rank else COMPUTE_DTYPE,
            out_dtype=COMPUTE_DTYPE,
            bias=False,
            dropout=dropout and rank > 0,
            keeps_low_rank=False,
            device="cuda",
        )
        problems |= dict.fromkeys(training_problems(forward))
    return list(problems)


def training_problems(forward: Problem) -> list[Problem]:
    """Both directions, with S kept for the backward and without: the device decides that."""
    kept = (False, True) if forward.rank else (False,)
    return [
        replace(forward, direction=direction, keeps_low_rank=keeps)
        for direction in ("forward", "backward")
        for keeps in kept
    ]
