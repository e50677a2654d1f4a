"""The experts' op in a graph: modules call it themselves, so that there is nothing to match."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from qlora_compile.kernels.experts.op import (
    QLORA_EXPERTS,
    ExpertsTensors,
    experts_problem,
    experts_spec,
)
from qlora_compile.passes.context import FusedExperts, PassContext
from qlora_compile.passes.nodes import example, stored_weight

_TENSORS = ("x", "offsets", "planes", "bias", "lora_a", "lora_b")


def record_experts(graph_module: GraphModule, context: PassContext) -> None:
    """Reads off the graph which sites of `context` the experts' op computes."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is QLORA_EXPERTS:
            names = [argument.name for argument in QLORA_EXPERTS._schema.arguments]
            call = dict(zip(names, node.args, strict=False)) | node.kwargs
            site = context.experts_site_of(stored_weight(call["planes"][0]))
            if site is not None:
                context.experts[site] = _fused(call)


def _fused(call: dict[str, Any]) -> FusedExperts:
    x, offsets, bias, lora_a, lora_b = (
        example(call[name]) for name in _TENSORS if name != "planes"
    )
    assert x is not None
    assert offsets is not None
    tensors = ExpertsTensors(x, offsets, call["planes"], bias, lora_a, lora_b)
    spec = experts_spec(*list(call.values())[len(_TENSORS) :])
    rows: Any = x.shape[0]
    # A dynamic dimension stands for many, what it was at capture is one.
    rows = rows if isinstance(rows, int) else rows.node.hint or 0
    forward = experts_problem("forward", rows, tensors, spec)
    return FusedExperts(forward, trains=torch.is_grad_enabled())
