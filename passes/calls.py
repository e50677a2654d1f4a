"""Fused calls in a graph: `qlora_linear` nodes, read and written by attribute."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from qlora_compile.kernels.call import Call
from qlora_compile.kernels.linear_call import tensor_indices
from qlora_compile.kernels.op import QLORA_LINEAR
from qlora_compile.passes.nodes import (
    insert_before,
    is_call,
    is_linear,
    linear_operands,
    stored_weight,
)


@dataclass(frozen=True)
class LinearNodes:
    """The nodes of one Linear's tensors; None for what it has not."""

    planes: tuple[Any, ...]
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None
    scaling: Any = None

    @property
    def weight(self) -> Any:
        """The placeholder of the stored weight."""
        return stored_weight(self.planes[0])


@dataclass(frozen=True)
class FusedCall:
    """A `qlora_linear` node's arguments; `linears` has the nodes of each Linear of `call`."""

    x: Any
    linears: tuple[LinearNodes, ...]
    seed: Any
    call: Call

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the op takes them."""
        tensors: list[Any] = []
        for each in self.linears:
            own = (*each.planes, each.bias, each.lora_a, each.lora_b, each.scaling)
            tensors += [node for node in own if node is not None]
        return self.x, tensors, self.seed, str(self.call)

    def without_dropout(self) -> FusedCall:
        return replace(self, seed=None, call=replace(self.call, dropout=0.0))


def is_fused(node: object) -> bool:
    """Whether `node` is a fused call."""
    return is_call(node, QLORA_LINEAR)


def read(node: Node) -> FusedCall:
    """What the fused call `node` computes."""
    x, tensors, seed, text = node.args
    call = Call.parse(str(text))
    named: list[dict[str, Any]] = [each.named(tensors) for each in tensor_indices(call)]  # type: ignore[arg-type]
    linears = tuple(LinearNodes(**each) for each in named)
    return FusedCall(x, linears, seed, call)


def insert_call(anchor: Node, fused: FusedCall) -> Node:
    """A fused call inserted before `anchor`; `output` gives what a Linear of it returns."""
    return insert_before(anchor, QLORA_LINEAR, fused.arguments)


def output(anchor: Node, call: Node, position: int = 0) -> Node:
    """What the Linear at `position` of the fused call `call` returns, read before `anchor`."""
    return insert_before(anchor, operator.getitem, (call, position))


def fused_call_of(value: Any) -> Node | None:
    """The fused call of a single Linear that returns `value` and nothing else that is used."""
    if not is_call(value, operator.getitem) or not is_fused(value.args[0]):
        return None
    call = value.args[0]
    return call if len(call.users) == 1 and len(read(call).linears) == 1 else None


def base_weights(node: Node) -> list[Any]:
    """The placeholder of each weight that a linear or a fused call multiplies with, behind casts
    and views; of other nodes none."""
    if is_linear(node):
        return [stored_weight(linear_operands(node)[1])]
    return [each.weight for each in read(node).linears] if is_fused(node) else []
