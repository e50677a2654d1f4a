"""Runs the passes over one captured graph: in order, checked after each, and logged."""

from __future__ import annotations

import logging

import torch
from torch.fx import GraphModule

from qlora_compile.errors import PassError
from qlora_compile.kernels.op import hinted_rows, linear_problem, linear_spec
from qlora_compile.kernels.variants.base import LinearTensors
from qlora_compile.passes.context import FusedSite, PassContext
from qlora_compile.passes.default import PASSES
from qlora_compile.passes.nodes import (
    arguments,
    base_weight,
    example,
    is_linear,
    is_qlora_linear,
    linear_operands,
)

logger = logging.getLogger(__name__)

_TENSORS = ("x", "planes", "bias", "lora_a", "lora_b", "seed")


def run_pipeline(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrites `graph_module` in place and fills `context`; returns the number of rewrites.

    Raises PassError when a pass loses a site: every Linear of the graph stays there, as a linear or
    as a `qlora_linear`.
    """
    rewritten = 0
    expected = _sites(graph_module, context)
    for run in PASSES:
        count = run(graph_module, context)
        graph_module.graph.lint()
        found = _sites(graph_module, context)
        if expected - found:
            raise PassError(name=run.__name__, lost=sorted(expected - found))
        expected = found
        logger.debug("%s: %d rewrites", run.__name__, count)
        rewritten += count
    if rewritten:
        graph_module.recompile()
    _record(graph_module, context)
    return rewritten


def _sites(graph_module: GraphModule, context: PassContext) -> set[str]:
    found = (
        context.site_of(base_weight(node))
        for node in graph_module.graph.nodes
        if is_linear(node) or is_qlora_linear(node)
    )
    return {site for site in found if site is not None}


def _record(graph_module: GraphModule, context: PassContext) -> None:
    """Reads off the rewritten graph what became of each site, whatever the passes believed."""
    for node in graph_module.graph.nodes:
        site = context.site_of(base_weight(node)) if is_qlora_linear(node) else None
        if site is not None:
            context.fused[site] = _fused_site(arguments(node))
    for node in graph_module.graph.nodes:
        if is_linear(node):
            site = context.adapter_site_of(linear_operands(node)[1])
            if site is not None:
                context.unfused[site] = (
                    "its adapter's computation is not plain LoRA; the base product alone is fused"
                )
    for site in context.unfused:
        context.fused.pop(site, None)
    context.unfused |= context.kept


def _fused_site(call: dict) -> FusedSite:
    x, bias, lora_a, lora_b, seed = (example(call[name]) for name in _TENSORS if name != "planes")
    assert x is not None
    tensors = LinearTensors(x, call["planes"], bias, lora_a, lora_b, seed)
    spec = linear_spec(*list(call.values())[len(_TENSORS) :])
    return FusedSite(
        forward=linear_problem("forward", hinted_rows(x, spec.k), tensors, spec),
        dropout=spec.dropout,
        trains=torch.is_grad_enabled(),
    )
