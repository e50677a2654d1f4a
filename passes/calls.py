"""Fused calls: reads `qlora_linear` nodes of a graph into dataclasses, and inserts new ones."""

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
    """The nodes of one Linear's tensors; None for each tensor that the Linear does not have."""

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
    """The arguments of a `qlora_linear` node.

    `linears` holds the nodes of each Linear in `call.linears`, in the same order.
    """

    x: Any
    linears: tuple[LinearNodes, ...]
    seed: Any
    call: Call

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments in the form the op takes: x, tensors, seed, text of the call."""
        tensors: list[Any] = []
        for each in self.linears:
            own = (*each.planes, each.bias, each.lora_a, each.lora_b, each.scaling)
            tensors += [node for node in own if node is not None]
        return self.x, tensors, self.seed, str(self.call)

    def without_dropout(self) -> FusedCall:
        return replace(self, seed=None, call=replace(self.call, dropout=0.0))


def is_fused(node: object) -> bool:
    return is_call(node, QLORA_LINEAR)


def read(node: Node) -> FusedCall:
    """Parse the arguments of the fused call `node`."""
    x, tensors, seed, text = node.args
    call = Call.parse(str(text))
    named: list[dict[str, Any]] = [each.named(tensors) for each in tensor_indices(call)]  # type: ignore[arg-type]
    linears = tuple(LinearNodes(**each) for each in named)
    return FusedCall(x, linears, seed, call)


def insert_call(anchor: Node, fused: FusedCall) -> Node:
    """Insert `fused` before `anchor` and return its node; `output` reads one Linear's result."""
    return insert_before(anchor, QLORA_LINEAR, fused.arguments)


def output(anchor: Node, call: Node, position: int = 0) -> Node:
    """Insert before `anchor` a node that reads the result of the Linear at `position` of `call`."""
    return insert_before(anchor, operator.getitem, (call, position))


def fused_call_of(value: Any) -> Node | None:
    """Return the fused call whose result is `value`; None unless it has one Linear and one user."""
    if not is_call(value, operator.getitem) or not is_fused(value.args[0]):
        return None
    call = value.args[0]
    return call if len(call.users) == 1 and len(read(call).linears) == 1 else None


def base_weights(node: Node) -> list[Any]:
    """Return the placeholders, behind casts and views, of the weights that `node` multiplies with.

    One for a linear, one per Linear for a fused call, none for any other node.
    """
    if is_linear(node):
        return [stored_weight(linear_operands(node)[1])]
    return [each.weight for each in read(node).linears] if is_fused(node) else []
