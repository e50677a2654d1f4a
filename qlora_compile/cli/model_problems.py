"""The Problems that training poses at the fused sites of a model."""

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
    """Return the Problems of an optimised model's fused sites, each once.

    rows: the numbers of rows (tokens) to return Problems for. device: where the training is to run;
    the model may be elsewhere. dtype: the dtype the training computes in, None for the model's.
    Raises NotOptimizedError if `model` is not optimised.
    """
    api.explain(model)
    regions = [region_of(module) for module in model.modules()]
    sites = [site for region in regions if region is not None for site in region.fused().values()]
    problems: dict[Problem, None] = {}
    for m in rows:
        for captured in dict.fromkeys(site.forward for site in sites):
            forward = replace(captured, m=bucket_rows(m), device=device)
            if dtype is not None:
                # Not the adapter's dtype, which PEFT keeps independent of the model's.
                forward = replace(forward, x_dtype=dtype, compute_dtype=dtype, out_dtype=dtype)
            problems |= dict.fromkeys(problems_of_call(forward, trains=True))
    return list(problems)
