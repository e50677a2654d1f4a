"""Products: turns x @ W.T + b, as some models write a Linear, into the linear that passes match."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import (
    ADDS,
    example,
    insert_before,
    insert_for,
    is_private,
    replace_node,
    transposed,
)

_PRODUCTS = (operator.matmul, torch.matmul, torch.mm)
_VIEWS = ("view", "reshape")


def linearize_matmuls(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite matmul(x, V) + bias and addmm(bias, x, V)  ⇒  linear(x, W, bias).

    V is the transpose of a site's weight W, or the site's stored weight itself (Conv1D), and then
    W = Vᵀ. The bias of a matmul is optional and must be the site's. The views that make x a matrix
    for addmm, and restore the dimensions of the result, are removed. Returns the number of
    rewrites.
    """
    rewritten = 0
    for node in list(graph_module.graph.nodes):
        if _is_product(node):
            (x, factor), bias = node.args, None
        elif node.target is torch.addmm and len(node.args) == 3 and not node.kwargs:
            bias, x, factor = node.args
        else:
            continue
        weight = transposed(factor)
        site = context.site_of(factor if weight is None else weight)
        if site is None or len(_shape(factor)) != 2:
            continue
        last = node
        if bias is None:
            last, bias = _with_bias(node, site, context)
        elif _shape(bias) != _shape(factor)[1:]:
            continue
        else:
            last, x = _without_views(node, x)
        if weight is None:
            weight = insert_before(node, torch.t, (factor,))
        linear = torch.nn.functional.linear
        # At the product's place, not the sum's: a node in between may write to x.
        replace_node(last, insert_for(last, node, linear, (x, weight, bias)))
        rewritten += 1
    return rewritten


def _is_product(node: Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    method = node.op == "call_method" and node.target in ("matmul", "mm", "__matmul__")
    return method or (node.op == "call_function" and node.target in _PRODUCTS)


def _with_bias(product: Node, site: str, context: PassContext) -> tuple[Node, Any]:
    """Return the sum of `product` and the site's bias, with the bias; else `product` and None.

    A sum in another dtype than the product's, as of a float32 bias under autocast, stays a sum.
    """
    user = next(iter(product.users), None)
    if is_private(product) and user is not None and user.target in ADDS and not user.kwargs:
        others = [argument for argument in user.args if argument is not product]
        if len(others) == 1 and context.site_of(others[0]) == site and len(_shape(others[0])) == 1:
            before, after = example(product), example(user)
            if before is not None and after is not None and before.dtype == after.dtype:
                return user, others[0]
    return product, None


def _without_views(product: Node, x: Any) -> tuple[Node, Any]:
    """Return the view that restores the leading dimensions of `product`, and x before its view.

    That is where `x` [M, K] is a view of a tensor with more dimensions, and the only user of
    `product` [M, N] is a view with the same leading ones; else `product` and `x` are returned.
    """
    user = next(iter(product.users), None)
    if _is_view(x) and is_private(product) and user is not None and _is_view(user):
        before = _shape(x.args[0])
        if before[-1:] == _shape(x)[1:] and _shape(user) == (*before[:-1], _shape(product)[1]):
            return user, x.args[0]
    return product, x


def _is_view(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_method" and node.target in _VIEWS


def _shape(node: Any) -> tuple[Any, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)
