"""Matching: replaces every frozen Linear and its LoRA branch by one `qlora_linear`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qlora_compile.kernels.call import Call, LinearCall
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.registry import UNQUANTIZED
from qlora_compile.passes.calls import (
    FusedCall,
    LinearNodes,
    base_weights,
    fused_call_of,
    insert_call,
    output,
    read,
)
from qlora_compile.passes.context import PassContext
from qlora_compile.passes.nodes import (
    ADDS,
    dropout_probability,
    example,
    insert_before,
    is_barred,
    is_cast,
    is_linear,
    is_private,
    linear_operands,
    replace_node,
    strip_casts,
    transposed,
    uncast,
)

_SEED_LIMIT = 2**62


def match_linears(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite linear(x, W, bias)  ⇒  a fused call, where W is the frozen weight of a site.

    W is stored unquantised here; quantised layers call the fused op already. Returns the number of
    rewrites.
    """
    rewritten = 0
    for node in list(graph_module.graph.nodes):
        if not is_linear(node):
            continue
        (base,) = base_weights(node)
        site = context.site_of(base)
        if site is None or site in context.kept:
            continue
        x, weight, bias = linear_operands(node)
        fake_weight, result = example(base), example(node)
        plane = strip_casts(weight)
        stored = strip_casts(transposed(plane) or plane)
        if fake_weight is None or result is None or stored is not base:
            context.unfused[site] = "the weight is computed, not stored"
            continue
        if fake_weight.requires_grad:
            context.unfused[site] = "the base weight is trained"
            continue
        n, k = fake_weight.shape if stored is plane else fake_weight.shape[::-1]
        linear = LinearCall(Layout(UNQUANTIZED, (n, k)), bias is not None)
        call = Call((linear,), result.dtype, result.dtype, result.dtype)
        fused = FusedCall(x, (LinearNodes((plane,), bias),), None, call)
        replace_node(node, output(node, insert_call(node, fused)))
        rewritten += 1
    return rewritten


def match_adapters(graph_module: GraphModule, context: PassContext) -> int:
    """Rewrite qlora_linear(x, W) + scaling * linear(linear(dropout(x), A), B, b)  ⇒  qlora_linear.

    A second adapter of a site is concatenated with the first, [A1; A2] and [s1 B1 | s2 B2], unless
    one of them has dropout: each adapter draws its own mask. Where A or B is itself the weight of a
    site, as in a low-rank branch that belongs to the model, both stay linears. Returns the number
    of rewrites.
    """
    graph = graph_module.graph

    @functools.cache
    def seed_on(device: torch.device) -> Node:
        # All dropouts of a graph share one draw from torch's generator, so that masks are the same
        # after `torch.manual_seed`, and in a checkpoint, which restores the generator.
        options = {"dtype": torch.int64, "device": device}
        return _insert_first(graph, torch.randint, 0, _SEED_LIMIT, (1,), **options)

    @functools.cache
    def scaling_tensor(value: float, device: torch.device, dtype: torch.dtype) -> Node:
        return _insert_first(graph, torch.full, (1,), value, dtype=dtype, device=device)

    rewritten = 0
    for node in list(graph.nodes):
        branch = _match_branch(node)
        if branch is None or any(map(context.site_of, (branch.lora_a, branch.lora_b))):
            continue
        base = read(branch.base)
        (nodes,), (linear,) = base.linears, base.call.linears
        last = _trailing_cast(node)
        result, fake_x, low_rank = example(last), example(base.x), example(branch.first)
        if result is None or fake_x is None or low_rank is None:
            continue
        if _must_stay_apart(branch, node):
            continue
        seed = seed_on(fake_x.device) if branch.dropout > 0.0 else None
        lora_a, lora_b = branch.lora_a, branch.lora_b
        rank, lora_dtype = low_rank.shape[-1], low_rank.dtype
        # The op takes the scaling as a tensor [1] of this dtype.
        wide = torch.promote_types(torch.float32, lora_dtype)
        if nodes.lora_a is None:
            scaling = branch.scaling
            if not isinstance(scaling, Node):
                scaling = scaling_tensor(float(scaling), fake_x.device, wide)
        else:
            if base.call.lora_dtype != lora_dtype:
                continue
            scaling = scaling_tensor(1.0, fake_x.device, wide)
            factors = ((nodes.lora_b, nodes.scaling), (lora_b, branch.scaling))
            scaled = [insert_before(node, torch.mul, factor) for factor in factors]
            lora_a = insert_before(node, torch.cat, ([nodes.lora_a, lora_a],))
            lora_b = insert_before(node, torch.cat, (scaled,), dim=1)
            rank += linear.rank
        bias = _with_adapter_bias(nodes.bias, branch, node)
        fused = FusedCall(
            branch.x,
            (LinearNodes(nodes.planes, bias, lora_a, lora_b, scaling),),
            seed,
            replace(
                base.call,
                linears=(LinearCall(linear.layout, bias is not None, rank, rewritten),),
                dropout=branch.dropout,
                lora_dtype=lora_dtype,
                out_dtype=result.dtype,
            ),
        )
        replace_node(last, output(node, insert_call(node, fused)))
        rewritten += 1
    return rewritten


@dataclass(frozen=True)
class _Branch:
    base: Node
    x: Node
    first: Node
    lora_a: Node
    lora_b: Node
    bias: Node | None
    scaling: float | Node
    dropout: float


def _with_adapter_bias(bias: Any, branch: _Branch, anchor: Node) -> Any:
    """Return `bias` plus `scaling` times lora_b's bias; either bias may be None."""
    if branch.bias is None:
        return bias
    scaled = insert_before(anchor, torch.mul, (branch.bias, branch.scaling))
    return scaled if bias is None else insert_before(anchor, torch.add, (bias, scaled))


def _match_branch(add: Node) -> _Branch | None:
    """Return the LoRA branch that `add` adds to a fused call, else None.

    No value in between may have another user: the rewrite would compute that value twice.
    """
    if add.op != "call_function" or add.target not in ADDS or len(add.args) != 2 or add.kwargs:
        return None
    for base, scaled in (add.args, add.args[::-1]):
        base, scaled = _strip_private(base), _strip_private(scaled)
        fused = fused_call_of(base)
        if fused is None or not is_private(base):
            continue
        if not isinstance(scaled, Node) or scaled.target not in (operator.mul, torch.mul):
            continue
        product: Any
        scaling: Any
        product, scaling = scaled.args
        if isinstance(product, (int, float)):
            product, scaling = scaling, product
        if not isinstance(scaling, (int, float)) and not _is_number(scaling):
            continue
        second = _strip_private(product)
        if not is_linear(second):
            continue
        first = _strip_private(linear_operands(second)[0])
        if not is_linear(first):
            continue
        adapted, lora_a, no_bias = linear_operands(first)
        if no_bias is not None:
            continue
        _, lora_b, bias = linear_operands(second)
        before = _strip_private(adapted)
        # A dropout with a second user stays; its result is then the adapter's input.
        probability = dropout_probability(before) if is_private(before) else None
        call = read(fused)
        x = _shared_input(call.x, adapted if probability is None else before.args[0])
        probability = probability or 0.0
        if x is None or (call.linears[0].lora_a and (probability or call.call.dropout)):
            continue
        private = (scaled, second, first)
        if all(is_private(node) for node in private) and 0.0 <= probability < 1.0:
            a, b = strip_casts(lora_a), strip_casts(lora_b)
            return _Branch(fused, x, first, a, b, bias, scaling, probability)
    return None


def _must_stay_apart(branch: _Branch, add: Node) -> bool:
    """Whether base and adapter must not be computed in one place.

    A node in between may write to x or to a copy of x, so that the two read different values, or
    autograd may be on for only one of the two.
    """
    copies = [
        copy
        for node in (read(branch.base).x, linear_operands(branch.first)[0])
        for copy in _nodes_between(branch.x, node)
    ]
    first = min([branch.base, branch.first, *copies])
    return is_barred(first, add, [branch.x, *copies])


def _nodes_between(x: Node, node: Any) -> Iterator[Node]:
    """Yield `node` and the casts, copies and dropout before it, back to `x`, which is left out."""
    while node is not x:
        yield node
        node = node.args[0]


def _shared_input(base_x: Any, adapter_x: Any) -> Node | None:
    """Return the input that base and adapter share behind casts; None if they share none.

    If the adapter's input is cast from the base's input, the base's input is returned, so that no
    wider copy is kept for the backward.
    """
    behind = adapter_x
    while behind is not base_x and is_cast(behind):
        behind = behind.args[0]
    if behind is base_x:
        return base_x
    source = strip_casts(base_x)
    return source if source is strip_casts(adapter_x) else None


def _insert_first(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Insert a call before the first node that computes a tensor, and return its node.

    Earlier nodes may enter no_grad or autocast, which are nodes too; they stay in front.
    """
    first = next(n for n in graph.nodes if n.op != "placeholder" and example(n) is not None)
    return insert_before(first, target, args, **kwargs)


def _is_number(node: Any) -> bool:
    """Whether `node` is an input tensor without dimensions, that is, a scaling that is data."""
    value = example(node)
    return (
        value is not None
        and isinstance(node, Node)
        and node.op == "placeholder"
        and value.dim() == 0
        and value.is_floating_point()
        and not value.requires_grad
    )


def _strip_private(node: Any) -> Any:
    """Return the value behind those casts and copies of `node` that have a single user."""
    while (source := uncast(node)) is not None and is_private(node):
        node = source
    return node


def _trailing_cast(node: Node) -> Node:
    """Return the cast that is the only user of `node`, else `node` itself."""
    user = next(iter(node.users), None)
    return user if is_private(node) and user is not None and is_cast(user) else node
