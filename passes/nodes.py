"""Reads and edits Dynamo's torch-level graphs: casts, linears, writes, fake tensors."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
from torch.fx import Node
from torch.fx.node import map_arg

ADDS = (operator.add, operator.iadd, torch.add)

_CAST_METHODS = ("to", "type", "float", "bfloat16", "half", "double")
_LAST_TWO = ({0, 1}, {-1, -2})
# As of torch 2.14, Dynamo writes the attributes T and mT as these operators.
_TRANSPOSING = ("t", torch.t, torch.ops.aten.numpy_T, torch.ops.aten.mT)
_COPY_METHODS = ("clone", "contiguous")
_WRITES = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.setitem,
)

_GRAD_MODES = (torch._C._set_grad_enabled, torch.set_grad_enabled)


def example(node: object) -> Tensor | None:
    """Return the fake tensor that Dynamo recorded for `node`, or None if it is not a tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def is_cast(node: object) -> bool:
    """Whether `node` changes at most the dtype, from one floating-point dtype to another."""
    if not isinstance(node, Node) or node.op != "call_method" or node.target not in _CAST_METHODS:
        return False
    if node.kwargs.get("memory_format", torch.preserve_format) is not torch.preserve_format:
        return False
    before, after = example(node.args[0]), example(node)
    return (
        before is not None
        and after is not None
        and before.device == after.device
        and before.is_floating_point()
        and after.is_floating_point()
    )


def uncast(node: Any) -> Node | None:
    """Return the node that `node` casts or copies, None if it does neither.

    Dtype and memory may differ, the mathematical value does not.
    """
    if not isinstance(node, Node) or node.op != "call_method":
        return None
    source = node.args[0] if node.target in _COPY_METHODS or is_cast(node) else None
    return source if isinstance(source, Node) else None


def strip_casts(node: Any) -> Any:
    """Return the value behind casts and copies, which may have other users too.

    Stops at a value that is written in place: from there on the copies may differ.
    """
    while (source := uncast(node)) is not None and not (is_written(node) or is_written(source)):
        node = source
    return node


def transposed(node: Any) -> Node | None:
    """Return the matrix that `node` transposes, None if it is not a transpose of a matrix."""
    if not isinstance(node, Node) or not node.args:
        return None
    source, *rest = node.args
    matrix = example(source)
    if matrix is None or matrix.dim() != 2:
        return None
    attribute = node.target is getattr and rest in (["T"], ["mT"])
    method = node.target in _TRANSPOSING or (
        node.target in ("transpose", torch.transpose) and set(rest) in _LAST_TWO
    )
    return source if isinstance(source, Node) and (attribute or method) else None


def dropout_probability(node: object) -> float | None:
    """Return the probability of the dropout `node`, 0 outside training; None for other nodes."""
    if not isinstance(node, Node) or node.target is not torch.nn.functional.dropout:
        return None
    call: dict[str, Any] = {"p": 0.5, "training": True}
    call |= dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return float(call["p"]) if call["training"] else 0.0


def is_written(node: Node) -> bool:
    """Whether a user of `node` changes `node` in place."""
    return any(node in written_by(user) for user in node.users)


def written_by(node: Node) -> list[Node]:
    """Return the inputs that `node` changes in place."""
    if node.target is triton_kernel_wrapper_mutation:
        return node.all_input_nodes  # only the kernel's code shows which it writes
    written = [node.kwargs.get("out")]
    # A call that does not name an overload has the schema of the default one.
    schema = getattr(getattr(node.target, "default", node.target), "_schema", None)
    if schema is not None:
        call = dict(enumerate(node.args)) | node.kwargs
        arguments = enumerate(schema.arguments)
        written += [call.get(i, call.get(each.name)) for i, each in arguments if each.is_write]
    elif node.args and _writes_first(node):
        written.append(node.args[0])
    found: list[Node] = []
    map_arg(written, found.append)
    return found


def _writes_first(node: Node) -> bool:
    """Whether `node` changes its first argument, as do `x += y`, `x.relu_()`, `torch.relu_(x)` and
    `functional.relu(x, inplace=True)`."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in _WRITES or re.fullmatch(r"\w*[^_]_", name):
        return True
    code = getattr(node.target, "__code__", None)
    names = code.co_varnames[: code.co_argcount] if code is not None else ()
    call = dict(zip(names, node.args, strict=False)) | node.kwargs
    return bool(call.get("inplace"))


def is_barred(first: Node, last: Node, reads: Iterable[Node]) -> bool:
    """Check whether a node that reads `reads` must not be moved between `first` and `last`.

    This holds if a node between `first` and `last`, both excluded, may write to the memory of
    `reads`, or switches autograd on or off.
    """
    storages = {_storage(node) for node in reads}
    node = first.next
    while node is not last:
        if node.target in _GRAD_MODES:
            return True
        written = {_storage(each) for each in written_by(node)}
        if written and (None in storages or not written.isdisjoint({None, *storages})):
            return True
        node = node.next
    return False


def _storage(node: Node) -> int | None:
    value = example(node)
    return None if value is None else value.untyped_storage()._cdata


def is_call(node: Any, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def is_linear(node: object) -> bool:
    return is_call(node, torch.nn.functional.linear)


def linear_operands(node: Node) -> tuple[Any, Any, Any]:
    """Return x, weight and bias (or None) of a linear node."""
    operands = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
    return operands["input"], operands["weight"], operands.get("bias")


def stored_weight(weight: Any) -> Any:
    """Return the placeholder behind the casts and views that make `weight`."""
    while isinstance(weight, Node) and weight.op != "placeholder" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return weight


def insert_before(
    anchor: Node, target: Callable[..., Any], args: tuple[Any, ...], **kwargs: Any
) -> Node:
    """Insert a call before `anchor` and return its node, with the fake tensor of its result."""
    node = _inserted(anchor, target, args, kwargs)
    examples = map_arg((args, kwargs), lambda n: n.meta["example_value"])
    fakes = [value for n in node.all_input_nodes if (value := example(n)) is not None]
    mode = getattr(fakes[0] if fakes else example(anchor), "fake_mode", None)
    assert mode is not None, f"{anchor} carries no fake tensor"
    # Without autograd: a checkpoint that is under way would count the tensors saved here.
    with mode, torch.no_grad():
        node.meta["example_value"] = target(*examples[0], **examples[1])
    return node


def insert_for(node: Node, anchor: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
    """Insert a call before `anchor` that computes the same as `node`, whose fake tensor it gets.

    The call is not evaluated: the graph may switch autocast at that place.
    """
    inserted = _inserted(anchor, target, args, {})
    inserted.meta["example_value"] = node.meta["example_value"]
    return inserted


def _inserted(
    anchor: Node, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args, kwargs)
    node.meta["nn_module_stack"] = anchor.meta.get("nn_module_stack", {})
    node.meta["stack_trace"] = anchor.meta.get("stack_trace")
    return node


def is_private(node: Node) -> bool:
    """Whether `node` has exactly one user."""
    return len(node.users) == 1


def replace_node(old: Node, new: Node) -> None:
    """Let `new` take the place of `old`, and erase the nodes that only `old` needed.

    Raises AssertionError if shape or dtype differ, because a pass must not change either.
    """
    before, after = example(old), example(new)
    assert before is not None
    assert after is not None
    assert (before.shape, before.dtype) == (after.shape, after.dtype), (old, before, after)
    # The storage of views of `old`, and of what is written to it, is that of its fake tensor.
    new.meta["example_value"] = before
    old.replace_all_uses_with(new)
    candidates = [old]
    while candidates:
        node = candidates.pop()
        if node.users or node.op not in ("call_function", "call_method"):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        candidates.extend(inputs)
