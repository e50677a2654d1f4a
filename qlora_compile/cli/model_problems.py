"""The Problems of a model's fused sites, as training it would pose them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from qlora_compile import api
from qlora_compile.capture.regions import region_of
from qlora_compile.kernels.problem import Problem, bucket_rows
from qlora_compile.kernels.selection import problems_of_call


def problems_of_model(
    model: nn.Module,
    rows: Iterable[int],
    dtype: torch.dtype | None = None,
    device: str = "cuda",
) -> list[Problem]:
    """Those of an optimised model's fused sites, each once, for each number of rows.

    The model may be on another `device` than the one they are for. dtype: what it computes in
    there, None for what it does here.
    Raises NotOptimizedError.
    """
    api.explain(model)
    regions = [region_of(module) for module in model.modules()]
    sites = [site for region in regions if region is not None for site in region.fused().values()]
    problems: dict[Problem, None] = {}
    for m in rows:
        for captured in dict.fromkeys(site.forward for site in sites):
            forward = replace(captured, m=bucket_rows(m), device=device)
            if dtype is not None:
                # An adapter's dtype is its own: PEFT keeps it apart from the model's.
                forward = replace(forward, x_dtype=dtype, compute_dtype=dtype, out_dtype=dtype)
            problems |= dict.fromkeys(problems_of_call(forward, trains=True))
    return list(problems)
