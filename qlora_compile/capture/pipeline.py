"""Runs the passes over one captured graph: in order, checked after each, and logged."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.errors import PassError
from qlora_compile.kernels.linear_call import group_problem, linear_spec
from qlora_compile.kernels.op import hinted_rows
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.variants.base import LinearTensors
from qlora_compile.passes.context import READ_PAST_THE_LAYER, FusedSite, PassContext
from qlora_compile.passes.default import PASSES
from qlora_compile.passes.experts import record_experts
from qlora_compile.passes.nodes import (
    base_weight,
    calls,
    example,
    is_linear,
    linear_operands,
    stored_weight,
)

logger = logging.getLogger(__name__)

_NOT_PLAIN = "its adapter's computation is not plain LoRA; the base product alone is fused"
_ONE_OF_SEVERAL = (
    "one of its adapters is fused with the base product; another, active with it, runs beside it: "
    "either drops out its input by a mask of its own, or is not plain LoRA, or of another dtype"
)

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
    record_experts(graph_module, context)
    return rewritten


def _sites(graph_module: GraphModule, context: PassContext) -> set[str]:
    found = (
        context.site_of(weight) for node in graph_module.graph.nodes for weight in _weights(node)
    )
    return {site for site in found if site is not None}


def _record(graph_module: GraphModule, context: PassContext) -> None:
    """Reads off the rewritten graph what became of each site, whatever the passes believed."""
    adapted: set[str] = set()
    for node in graph_module.graph.nodes:
        linears = calls(node)
        if not linears:
            continue
        forward = _forward(linears)
        for call in linears:
            site = context.site_of(stored_weight(call["planes"][0]))
            if site is None:
                continue
            if call["lora_a"] is not None:
                adapted.add(site)
            elif site in adapted:
                # DoRA multiplies by W for its norm, too; the product the adapter is in tells.
                continue
            dropout = call["dropout"] if call["lora_a"] is not None else 0.0
            context.fused[site] = FusedSite(forward, dropout, torch.is_grad_enabled())
    for node in graph_module.graph.nodes:
        if is_linear(node):
            site = context.adapter_site_of(linear_operands(node)[1])
            if site is not None:
                context.unfused[site] = _ONE_OF_SEVERAL if site in adapted else _NOT_PLAIN
    found = _sites(graph_module, context)
    for node in graph_module.graph.nodes:
        site, value = context.site_of(node), example(node)
        if site is not None and site not in found and value is not None and value.dim() == 2:
            context.unfused.setdefault(site, READ_PAST_THE_LAYER)
    for site in context.unfused:
        context.fused.pop(site, None)
    context.unfused |= context.kept


def _weights(node: Node) -> list[Any]:
    """What stands for the stored weight of each Linear that `node` computes."""
    if is_linear(node):
        return [base_weight(node)]
    return [stored_weight(call["planes"][0]) for call in calls(node)]


def _forward(linears: list[dict[str, Any]]) -> Problem:
    """The Problem of a node that computes `linears`."""
    group = []
    for call in linears:
        x, bias, lora_a, lora_b, seed = (
            example(call[name]) for name in _TENSORS if name != "planes"
        )
        assert x is not None
        tensors = LinearTensors(x, call["planes"], bias, lora_a, lora_b, seed)
        group.append((tensors, linear_spec(*list(call.values())[len(_TENSORS) :])))
    rows = hinted_rows(group[0][0].x, group[0][1].k)
    return group_problem("forward", rows, group)
