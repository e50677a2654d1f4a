"""Runs a captured graph and its rewritten twin on the same values, in float64 and with the same
dropout masks, so that only a wrong rewrite makes a difference."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from qlora_compile.kernels.specification import dropped_out
from qlora_compile.passes.calls import is_fused, read
from qlora_compile.passes.nodes import (
    example,
    is_cast,
    is_linear,
    linear_operands,
    strip_casts,
)
from qlora_compile.verify.graph_forms import widened_call
from tests.passes.recorder import source_name

WIDE = torch.float64
_SEED = torch.tensor([0x5DEECE66D])


def widen(graph_module: GraphModule) -> None:
    """Turn all floating-point dtypes into float64."""

    def wide(argument: Any) -> Any:
        floating = isinstance(argument, torch.dtype) and argument.is_floating_point
        return WIDE if floating else argument

    for node in graph_module.graph.nodes:
        if is_cast(node):
            before, after = example(node.args[0]), example(node)
            assert before is not None
            assert after is not None
            # What was a copy stays one.
            node.kwargs = {"copy": before.dtype != after.dtype}
            node.target, node.args = "to", (node.args[0], WIDE)
        node.args, node.kwargs = tree_map(wide, (node.args, node.kwargs))
        if is_fused(node):
            fused = read(node)
            node.args = replace(fused, call=widened_call(fused.call, WIDE)).arguments


def drop_alike(original: GraphModule, rewritten: GraphModule) -> None:
    """Give the dropouts of `original` the masks of the fused calls they became.

    A dropout is identified by the B behind it. A dropout that is still in `rewritten` keeps all in
    both graphs; if an adapter is fused in some of its calls only, nothing is dropped anywhere."""
    streams: dict[str, list[int]] = defaultdict(list)
    for node in rewritten.graph.nodes:
        if is_fused(node) and (fused := read(node)).call.dropout:
            for nodes, linear in zip(fused.linears, fused.call.linears, strict=True):
                if linear.rank:
                    streams[strip_casts(nodes.lora_b).name].append(linear.stream)
        if node.target is torch.randint:
            node.target, node.args, node.kwargs = _seed, (), {}
    dropouts = Counter(filter(None, map(_dropped_factor, original.graph.nodes)))
    if any(len(mine) != dropouts[name] for name, mine in streams.items()):
        streams.clear()
        for node in rewritten.graph.nodes:
            if is_fused(node):
                node.args = read(node).without_dropout().arguments
    for mine in streams.values():
        mine.sort()  # numbered in the order of the dropouts
    for graph_module in (original, rewritten):
        for node in graph_module.graph.nodes:
            if node.target is not nn.functional.dropout:
                continue
            mine = streams[_dropped_factor(node) or ""]
            if mine and graph_module is original:
                node.target, node.kwargs = _dropped, {"p": node.kwargs["p"], "stream": mine.pop(0)}
            else:
                node.kwargs = node.kwargs | {"p": 0.0}


def _dropped_factor(node: Node) -> str | None:
    """Return the B behind a dropout, by its placeholder's name."""
    if node.target is not nn.functional.dropout:
        return None
    low_ranks = [user for user in node.users if is_linear(user)]
    products = [user for low in low_ranks for user in low.users if is_linear(user)]
    return strip_casts(linear_operands(products[0])[1]).name if products else None


def _seed() -> Tensor:
    return _SEED


def _dropped(x: Tensor, p: float, stream: int) -> Tensor:
    return dropped_out(x, _SEED, stream, p)


def inputs_of(program: nn.Module, x: Tensor, *, wide: bool) -> dict[str, Tensor]:
    """Return what a program's graph takes, by its sources; planes of packed weights are never
    widened."""
    named = [
        (source_name(program, n), t) for n, t in program.named_parameters(remove_duplicate=False)
    ]
    tensors = {"L['x']": x} | dict(named)
    if wide:
        tensors = {
            n: t.detach().to(WIDE).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for n, t in tensors.items()
        }
    return tensors | {source_name(program, n): t for n, t in program.named_buffers()}


def run(graph_module: GraphModule, tensors: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Return the outputs, and the gradients of `tensors`, which are the inputs by their sources."""
    leaves = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in tensors.items()}
    # x is no leaf: programs write to it. What is saved for the backward is saved as it was, as in
    # a compiled graph.
    inputs = {n: t.clone() if n == "L['x']" else t for n, t in leaves.items()}
    with saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        # Generating code for a graph takes longer than running it.
        outputs = Interpreter(graph_module).run(*(inputs[_source(node)] for node in placeholders))
        trained = {n: t for n, t in leaves.items() if t.requires_grad}
        grads: Any = [None] * len(trained)
        differentiable = [o for o in outputs if o.requires_grad]
        if differentiable and trained:
            weights = [
                torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)
                for o in differentiable
            ]
            grads = torch.autograd.grad(
                differentiable, list(trained.values()), weights, allow_unused=True
            )
    results: dict[str, Tensor | None] = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | dict(zip(trained, grads, strict=True))


def _source(placeholder: Node) -> str:
    return placeholder.meta["grapharg"].source.name
