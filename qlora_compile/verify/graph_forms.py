"""Forms of a graph for its check: without dropout, with the masks of the fused op, and computed by
the specification, in its own dtypes or in wider ones.

Each form is a copy of the graph. Parameters are inputs of the graph, so no copy holds any.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_map

from qlora_compile.kernels.attention import ATTENTION
from qlora_compile.kernels.call import Call
from qlora_compile.kernels.formats.formats import planes_of
from qlora_compile.kernels.layout import Plane
from qlora_compile.kernels.linear_call import tensor_indices
from qlora_compile.kernels.packed import of_bytes
from qlora_compile.kernels.selector import MODELLED
from qlora_compile.kernels.specification import SPECIFIED, dropped_out
from qlora_compile.passes.calls import FusedCall, is_fused, read
from qlora_compile.passes.nodes import (
    dropout_probability,
    is_cast,
    is_linear,
    linear_operands,
    stored_weight,
    strip_casts,
)

SEED = 20240229
"""The seed of every fused dropout in a check."""

_DROPOUT = torch.nn.functional.dropout
_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_CASTS = ("float", "half", "bfloat16", "double")

Masks = dict[str, tuple[int, float]]
"""Stream and probability of each fused dropout, by the placeholder of the adapter's A.

The rewritten graph and the captured one have the same name for that placeholder.
"""


def fused_masks(rewritten: GraphModule) -> Masks:
    """Return the masks that fused ops of `rewritten` draw; empty if none of them has dropout."""
    return {
        stored_weight(nodes.lora_a).name: (linear.stream, fused.call.dropout)
        for fused in _fused_calls(rewritten)
        for nodes, linear in zip(fused.linears, fused.call.linears, strict=True)
        if fused.call.dropout and linear.rank
    }


def drops_out(graph_module: GraphModule) -> bool:
    """Whether a rewritten graph draws masks, in fused ops or by torch's dropout."""
    return bool(fused_masks(graph_module)) or any(
        dropout_probability(node) or _dropout_of_attention(node)
        for node in graph_module.graph.nodes
    )


def _dropout_of_attention(node: Node) -> Any:
    if node.target is not _ATTENTION:
        return 0.0
    return node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)


def _fused_calls(graph_module: GraphModule) -> list[FusedCall]:
    return [read(node) for node in graph_module.graph.nodes if is_fused(node)]


def lost_dropout(original: GraphModule, rewritten: GraphModule, masks: Masks) -> str | None:
    """Return the placeholder of a fused adapter's A whose dropout differs between the graphs, or
    None.

    It differs if `original` drops out its input with another probability than `rewritten`, which
    has the masks `masks`. No comparison of numbers would show the difference.
    """
    dropouts = [node for node in original.graph.nodes if node.target is _DROPOUT]
    expected = {
        name: dropout_probability(node) for node in dropouts for name in _weights_after(node)
    }
    for fused in _fused_calls(rewritten):
        # If the base product reads the dropped-out x too, as in DoRA, the dropout stays a node.
        before = dropout_probability(strip_casts(fused.x)) or 0.0
        for nodes in fused.linears:
            if nodes.lora_a is None:
                continue
            # A factor that was concatenated from several adapters' has no dropout before it.
            name = stored_weight(nodes.lora_a).name
            if expected.get(name, 0.0) != (masks[name][1] if name in masks else before):
                return name
    return None


def with_masks(graph_module: GraphModule, masks: Masks) -> GraphModule:
    """Return a copy of the captured or the rewritten graph whose dropout is reproducible.

    masks: the result of `fused_masks`, whose masks are drawn from SEED, while every other dropout
    is off; or empty, for no dropout at all.
    """
    graph_module = copy.deepcopy(graph_module)
    for node in graph_module.graph.nodes:
        if is_fused(node):
            node.args = _with_masks(read(node), masks).arguments
        elif node.target is _DROPOUT:
            found = [masks[name] for name in _weights_after(node) if name in masks]
            stream, probability = found[0] if found else (0, 0.0)
            node.target, node.args = masked, (_operand(node), stream, probability)
            node.kwargs = {}
        elif node.target is _ATTENTION:
            # query, key, value and attn_mask come first; dropout_p is the fifth argument.
            node.args = (*node.args[:4], 0.0, *node.args[5:]) if len(node.args) > 4 else node.args
            if len(node.args) <= 4:
                node.kwargs = dict(node.kwargs) | {"dropout_p": 0.0}
    graph_module.recompile()
    return graph_module


def _with_masks(fused: FusedCall, masks: Masks) -> FusedCall:
    if not masks:
        return fused.without_dropout()
    if not fused.call.dropout:
        return fused
    fused.seed.target, fused.seed.args = torch.full, ((1,), SEED)
    # A Linear that is called twice has two streams. `masks` has one by its name, used for both.
    linears = tuple(
        replace(linear, stream=masks[stored_weight(nodes.lora_a).name][0])
        if linear.rank
        else linear
        for nodes, linear in zip(fused.linears, fused.call.linears, strict=True)
    )
    return replace(fused, call=replace(fused.call, linears=linears))


def masked(x: Tensor, stream: int, probability: float) -> Tensor:
    """Return x [..., K] dropped out by the mask that the fused op draws from SEED."""
    if probability == 0.0:
        return x.clone()
    seed = torch.full((1,), SEED, dtype=torch.int64, device=x.device)
    return dropped_out(x, seed, stream, probability)


def _operand(dropout: Node) -> Any:
    return dropout.args[0] if dropout.args else dropout.kwargs["input"]


def _weights_after(dropout: Node) -> list[str]:
    """Return the placeholders of weights that multiply a dropout's result, mostly a LoRA A."""
    users, weights = list(dropout.users), []
    while users:
        user = users.pop()
        if is_linear(user):
            weights.append(stored_weight(linear_operands(user)[1]).name)
        elif is_cast(user):
            users += user.users
    return weights


def specified(captured: GraphModule, wide: torch.dtype | None) -> GraphModule:
    """Return the captured graph with our ops replaced by their specification.

    The specification decodes packed weights as the formats specify, and uses none of the kernels to
    be checked. wide: the dtype to compute in, as `widened` does; None for the graph's own dtypes.
    """
    graph_module = copy.deepcopy(captured) if wide is None else widened(captured, wide)
    for part in _parts(graph_module):
        for node in part.graph.nodes:
            specification = SPECIFIED.get(node.target)
            if specification is not None:
                node.args, node.target = (wide, *node.args), specification
        part.recompile()
    return graph_module


def widened(graph_module: GraphModule, wide: torch.dtype) -> GraphModule:
    """Return a copy in which `wide` replaces every floating-point dtype, without autocast.

    The planes of packed weights, widened with all the other inputs, are cast back without loss.
    """
    graph_module = copy.deepcopy(graph_module).to(wide)
    for part in _parts(graph_module):
        for node in part.graph.nodes:
            if node.target is torch.amp.autocast_mode._enter_autocast:
                device, _, _, *rest = node.args
                node.args = (device, None, False, *rest)
            elif node.op == "call_method" and node.target in _CASTS:
                node.target, node.args = "to", (node.args[0], wide)
            elif node.target in SPECIFIED and node.target is not ATTENTION:
                x, tensors, seed, text = node.args
                call = Call.parse(str(text))
                tensors = _with_stored_planes(part, node, tensors, call)
                node.args = (x, tensors, seed, str(widened_call(call, wide)))
            else:
                node.args = tree_map(lambda value: _widened(value, wide), tuple(node.args))
                node.kwargs = tree_map(lambda value: _widened(value, wide), dict(node.kwargs))
        part.recompile()
    return graph_module


def _with_stored_planes(
    part: GraphModule, node: Node, tensors: Sequence[Any], call: Call
) -> list[Any]:
    """Return the `tensors` of `node`, a call of one of our ops, with packed planes cast to the
    dtypes that their formats declare."""
    cast = list(tensors)
    for at, plane in packed_planes(call):
        if plane.dtype.is_floating_point:
            with part.graph.inserting_before(node):
                cast[at] = part.graph.call_function(_stored, (cast[at], plane.dtype))
    return cast


def _stored(plane: Tensor, dtype: torch.dtype) -> Tensor:
    return of_bytes(plane, dtype).to(dtype)


def packed_planes(call: Call) -> list[tuple[int, Plane]]:
    """Return the planes of the packed weights of `call`, each with its place in the tensors."""
    return [
        (at, plane)
        for linear, indices in zip(call.linears, tensor_indices(call), strict=True)
        if linear.layout.quantized
        for at, plane in enumerate(planes_of(linear.layout), indices.planes.start)
    ]


def packed_inputs(graph_module: GraphModule) -> set[str]:
    """Return the names of the placeholders that are planes of packed weights."""
    return {
        node.args[1][at].name
        for node in graph_module.graph.nodes
        if node.target in SPECIFIED and node.target is not ATTENTION
        for at, _ in packed_planes(Call.parse(str(node.args[3])))
        if node.args[1][at].op == "placeholder"
    }


def _parts(graph_module: GraphModule) -> list[GraphModule]:
    """Return `graph_module` and the inner graphs that it passes to higher-order ops."""
    return [module for module in graph_module.modules() if isinstance(module, GraphModule)]


def widened_call(call: Call, wide: torch.dtype) -> Call:
    """Return `call` in the dtype `wide`, with its variant chosen by the cost model.

    No model runs in these dtypes, so no records are looked up or measured for them.
    """
    return replace(call, compute_dtype=wide, lora_dtype=wide, out_dtype=wide, records=MODELLED)


def _widened(value: Any, wide: torch.dtype) -> Any:
    return wide if isinstance(value, torch.dtype) and value.is_floating_point else value
