"""x @ W.T + b, as some models write a Linear themselves, in the form the other passes know."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import ADDS, example, insert_before, is_private, replace_node

_PRODUCTS = (operator.matmul, torch.matmul, torch.mm)
_LAST_TWO = ({0, 1}, {-1, -2})


def linearize_matmuls(graph_module: GraphModule, context: PassContext) -> int:
    """matmul(x, transposed W of a site), and the site's bias added to it  ⇒  linear(x, W, bias)."""
    rewritten = 0
    for node in list(graph_module.graph.nodes):
        weight = _transposed(node.args[1]) if _is_product(node) else None
        site = context.site_of(weight)
        if site is None:
            continue
        last, bias = node, None
        user = next(iter(node.users), None)
        if is_private(node) and user is not None and user.target in ADDS and not user.kwargs:
            others = [argument for argument in user.args if argument is not node]
            if len(others) == 1 and context.site_of(others[0]) == site and _rank(others[0]) == 1:
                last, bias = user, others[0]
        linear = torch.nn.functional.linear
        replace_node(last, insert_before(last, linear, (node.args[0], weight, bias)))
        rewritten += 1
    return rewritten


def _is_product(node: Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    method = node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")
    return method or (node.op == "call_function" and node.target in _PRODUCTS)


def _transposed(node: Any) -> Node | None:
    """The matrix that `node` is the transpose of."""
    if not isinstance(node, Node) or not node.args or _rank(node.args[0]) != 2:
        return None
    source, *rest = node.args
    attribute = node.target is getattr and rest in (["T"], ["mT"])
    method = node.op == "call_method" and (
        node.target == "t" or (node.target == "transpose" and set(rest) in _LAST_TWO)
    )
    return source if isinstance(source, Node) and (attribute or method) else None


def _rank(node: Any) -> int | None:
    value = example(node)
    return None if value is None else value.dim()
