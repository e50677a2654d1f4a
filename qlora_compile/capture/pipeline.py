"""Runs the passes over one captured graph in order, checks the graph after each, and logs."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch.fx import GraphModule

from qlora_compile.errors import PassError
from qlora_compile.kernels.formats.formats import format_of
from qlora_compile.kernels.gpu.target import target_of
from qlora_compile.kernels.linear_call import problem_of
from qlora_compile.kernels.op import hinted_rows
from qlora_compile.kernels.selector import ModelledSelector
from qlora_compile.passes.calls import base_weights, is_fused, read
from qlora_compile.passes.context import READ_PAST_THE_LAYER, FusedSite, PassContext, module_site
from qlora_compile.passes.default import PASSES
from qlora_compile.passes.experts import record_experts
from qlora_compile.passes.nodes import example, is_linear, linear_operands

logger = logging.getLogger(__name__)

_NOT_PLAIN = "its adapter's computation is not plain LoRA; the base product alone is fused"
_OWN_WAY = "its layer multiplies by its weight with other operators than a linear"
_ONE_OF_SEVERAL = (
    "one of its adapters is fused with the base product; another active one runs separately, "
    "because one of the two has dropout (a mask of its own) or another dtype, or is not plain LoRA"
)


def run_pipeline(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite `graph_module` in place and fill `context`; return the number of rewrites.

    Raises PassError if a pass loses a site: every Linear must stay in the graph, as a linear or in
    a fused call.
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
        context.site_of(weight)
        for node in graph_module.graph.nodes
        for weight in base_weights(node)
    )
    return {site for site in found if site is not None}


def _record(graph_module: GraphModule, context: PassContext) -> None:
    """Record what became of each site, as seen in the rewritten graph, whatever the passes say."""
    adapted: set[str] = set()
    for node in graph_module.graph.nodes:
        if not is_fused(node):
            continue
        fused = read(node)
        x = example(fused.x)
        assert x is not None
        forward = problem_of(fused.call, "forward", hinted_rows(x, fused.call.k), x)
        for nodes, linear in zip(fused.linears, fused.call.linears, strict=True):
            site = context.site_of(nodes.weight)
            if site is None:
                continue
            if linear.rank:
                adapted.add(site)
            elif site in adapted:
                # DoRA multiplies by W for its norm too; the product with the adapter is the site's.
                continue
            dropout = fused.call.dropout if linear.rank else 0.0
            context.fused[site] = FusedSite(forward, dropout, torch.is_grad_enabled())
    for node in graph_module.graph.nodes:
        if is_linear(node):
            site = context.adapter_site_of(linear_operands(node)[1])
            if site in adapted:
                context.unfused[site] = _ONE_OF_SEVERAL
            elif site in context.fused:
                context.unfused[site] = _NOT_PLAIN
    found = _sites(graph_module, context)
    for node in graph_module.graph.nodes:
        site, value = context.site_of(node), example(node)
        if site is not None and site not in found and value is not None and value.dim() == 2:
            inside = any(module_site(user) == site for user in node.users)
            context.unfused.setdefault(site, _OWN_WAY if inside else READ_PAST_THE_LAYER)
    context.unfused |= context.kept
    for site in context.unfused:
        context.fused.pop(site, None)


def settle_calls(graph_module: GraphModule, selector: ModelledSelector) -> None:
    """Write the selector's name and one decision of the selector into every fused call.

    The decision is whether the forward saves S = x Aᵀ for the backward. The tables for decoding
    weights on a GPU are made now: the first call may be captured in a CUDA graph, during which
    nothing can be copied from the host.
    """
    for node in filter(is_fused, graph_module.graph.nodes):
        fused = read(node)
        x = example(fused.x)
        assert x is not None
        factors = [each for nodes in fused.linears for each in (nodes.lora_a, nodes.lora_b)]
        examples = [value for each in factors if (value := example(each)) is not None]
        trains = torch.is_grad_enabled() and any(value.requires_grad for value in examples)
        call = replace(fused.call, records=selector.name)
        if trains:
            forward = problem_of(call, "forward", hinted_rows(x, call.k), x)
            call = replace(call, save_low_rank=selector.saves_low_rank(forward))
        node.args = replace(fused, call=call).arguments
        if target_of(str(x.device)) is not None:
            for linear in call.linears:
                quant_format = format_of(linear.layout)
                if quant_format is not None:
                    quant_format.device_tables(x.device)
    graph_module.recompile()
