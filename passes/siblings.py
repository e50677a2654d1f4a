"""Siblings: Linears that share their input become one `qlora_linear_group`.

x is read and saved once, the adapters' A's are one product, and dX is summed up once. They may
differ in N, bias, adapter, rank and scaling; what has to agree is in `_key`.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.kernels.op import QLORA_LINEAR_GROUP
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import (
    PER_SIBLING,
    arguments,
    example,
    insert_before,
    is_barred,
    is_cast,
    is_qlora_linear,
    is_written,
    replace_node,
)

_MOVABLE = (torch.add, torch.cat, torch.mul)
"""What the passes themselves put between a parameter and a call."""


def group_siblings(graph_module: GraphModule, context: PassContext) -> int:
    """qlora_linear(x, …) of one x, several  ⇒  qlora_linear_group(x, …) where the first stood."""
    found: dict[Hashable, list[list[Node]]] = defaultdict(list)
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if not is_qlora_linear(node) or not node.users:
            continue
        groups = found[_key(arguments(node))]
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


def _key(call: dict[str, Any]) -> Hashable:
    names = ("x", "format", "k", "block_size", "compute_dtype", "out_dtype")
    planes = [example(plane) for plane in call["planes"]]
    described = tuple((plane.dtype, plane.device) for plane in planes if plane is not None)
    return (*(call[name] for name in names), described)


def _joins(node: Node, group: list[Node], order: dict[Node, int]) -> bool:
    """Whether `node` may be computed with and where `group` is."""
    call = arguments(node)
    if call["lora_a"] is not None:
        for other in map(arguments, group):
            names = ("lora_dtype", "dropout", "seed")
            if other["lora_a"] is not None and any(call[name] != other[name] for name in names):
                return False
    first = group[0]
    if is_barred(first, node, (call["x"],)):
        return False
    inputs = [each for each in node.all_input_nodes if each is not call["x"]]
    return all(_is_available(each, first, order) for each in inputs)


def _is_available(node: Node, anchor: Node, order: dict[Node, int]) -> bool:
    """Whether `node` stands before `anchor`, or can be moved there."""
    if is_written(node):
        return False
    if node.op == "placeholder" or order.get(node, -1) < order[anchor]:
        return True
    movable = is_cast(node) or (node.op == "call_function" and node.target in _MOVABLE)
    return movable and all(_is_available(each, anchor, order) for each in node.all_input_nodes)


def _rewrite(group: list[Node], order: dict[Node, int]) -> None:
    linears = [arguments(node) for node in group]
    anchor = group[0]
    for node in group[1:]:
        for source in node.all_input_nodes:
            _move_before(source, anchor, order)
    adapted = next((call for call in linears if call["lora_a"] is not None), linears[0])
    call = adapted | {name: [each[name] for each in linears] for name in PER_SIBLING}
    call["planes"] = [plane for each in linears for plane in each["planes"]]
    joined = insert_before(anchor, QLORA_LINEAR_GROUP, tuple(call.values()))
    for i, node in enumerate(group):
        replace_node(node, insert_before(anchor if i == 0 else node, operator.getitem, (joined, i)))


def _move_before(node: Node, anchor: Node, order: dict[Node, int]) -> None:
    if node.op == "placeholder" or order.get(node, -1) < order[anchor]:
        return
    for source in node.all_input_nodes:
        _move_before(source, anchor, order)
    anchor.prepend(node)
    order[node] = order[anchor] - 1
