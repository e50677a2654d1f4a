"""Siblings: joins Linears that share their input x into one fused call.

The joint call reads and saves x once, multiplies x with the A of all adapters in one product, and
sums up dX once. Siblings may differ in N, bias, adapter and rank; `_key` holds what must agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from qlora_compile.passes.calls import FusedCall, insert_call, is_fused, output, read
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import example, is_barred, is_cast, is_written, replace_node

_MOVABLE = (torch.add, torch.cat, torch.mul)
"""Functions that passes insert between a parameter and a fused call."""


def group_siblings(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite fused calls of one x, each of a single Linear  ⇒  one fused call.

    The joint call is put where the first of them was. Returns the number of rewrites.
    """
    found: dict[Hashable, list[list[Node]]] = defaultdict(list)
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if not is_fused(node) or not any(result.users for result in node.users):
            continue
        groups = found[_key(read(node))]
        for group in groups:
            if _joins(node, group, order):
                group.append(node)
                break
        else:
            groups.append([node])
    rewritten = 0
    for groups in found.values():
        for group in groups:
            if len(group) > 1:
                _rewrite(group, order)
                rewritten += 1
    return rewritten


def _key(fused: FusedCall) -> Hashable:
    call, layout = fused.call, fused.call.linears[0].layout
    planes = [example(plane) for plane in fused.linears[0].planes]
    stored = tuple((plane.dtype, plane.device) for plane in planes if plane is not None)
    dtypes = (call.compute_dtype, call.out_dtype)
    return fused.x, call.k, layout.format, layout.parameters, *dtypes, stored


def _joins(node: Node, group: list[Node], order: dict[Node, int]) -> bool:
    """Whether `node` can be computed in one call with `group`, in the place of its first node."""
    fused = read(node)
    adapters = [other for other in map(read, group) if other.call.rank]
    if fused.call.rank and any(_drop(fused) != _drop(other) for other in adapters):
        return False
    first = group[0]
    if is_barred(first, node, (fused.x,)):
        return False
    inputs = [each for each in node.all_input_nodes if each is not fused.x]
    return all(_is_available(each, first, order) for each in inputs)


def _drop(fused: FusedCall) -> Hashable:
    """Return what all adapters of one call must have in common."""
    return fused.call.lora_dtype, fused.call.dropout, fused.seed


def _is_available(node: Node, anchor: Node, order: dict[Node, int]) -> bool:
    """Whether `node` is before `anchor` or can be moved there, with all its inputs."""
    if is_written(node):
        return False
    if node.op == "placeholder" or order.get(node, -1) < order[anchor]:
        return True
    movable = is_cast(node) or (node.op == "call_function" and node.target in _MOVABLE)
    return movable and all(_is_available(each, anchor, order) for each in node.all_input_nodes)


def _rewrite(group: list[Node], order: dict[Node, int]) -> None:
    anchor, calls = group[0], [read(node) for node in group]
    for node in group[1:]:
        for operand in node.all_input_nodes:
            _move_before(operand, anchor, order)
    adapted = next((fused for fused in calls if fused.call.rank), calls[0])
    linears = tuple(linear for fused in calls for linear in fused.call.linears)
    nodes = tuple(each for fused in calls for each in fused.linears)
    joined = replace(adapted, linears=nodes, call=replace(adapted.call, linears=linears))
    call = insert_call(anchor, joined)
    for i, node in enumerate(group):
        for result in list(node.users):
            replace_node(result, output(result, call, i))


def _move_before(node: Node, anchor: Node, order: dict[Node, int]) -> None:
    if node.op == "placeholder" or order.get(node, -1) < order[anchor]:
        return
    for operand in node.all_input_nodes:
        _move_before(operand, anchor, order)
    anchor.prepend(node)
    order[node] = order[anchor] - 1
