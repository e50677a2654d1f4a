"""Steps of a plan as numbers, which plan.cpp reads in the same order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["input", "constant", "memory", "value"]


class UnplannableError(Exception):
    """A recorded run cannot be replayed; the message says why."""


@dataclass(frozen=True)
class Source:
    """The origin that a pointer is counted from: a tensor that the call is given, a tensor that is
    the same in every call, memory that the call allocates, or an operator's own result."""

    kind: Kind
    index: int


Numbers = list[int | Source]

Placed = Callable[[Tensor], tuple[Source, int]]
"""The source of a tensor, and the bytes from there to its first element."""


@dataclass(frozen=True)
class Step:
    """A launch of a Triton kernel, or a call of one of torch's operators. results: the indices of
    the values that it makes."""

    is_operator: bool
    names: Sequence[str]
    numbers: Numbers
    results: Sequence[int] = field(default_factory=list)

    @property
    def sources(self) -> set[Source]:
        return {each for each in self.numbers if isinstance(each, Source)}


_NONE, _INT, _FLOAT, _BOOL, _INTS, _DEVICE, _VIEW, _VIEWS, _NUMBER, _WHOLE = range(10)


def operator_step(
    operator: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    results: Sequence[int | None],
    place: Placed,
    device: torch.device,
) -> Step:
    """Return the step that calls `operator`, a torch.ops.….overload. results: the values that its
    results become, None for a tensor that it wrote to.

    Raises UnplannableError for an argument of a kind that plans do not hold.
    """
    schema = operator._schema
    numbers: Numbers = [len(schema.arguments)]
    for position, argument in enumerate(schema.arguments):
        value = kwargs.get(argument.name, argument.default_value)
        if position < len(args):
            value = args[position]
        numbers += _argument(value, str(argument.type), place, device)
    values = [each for each in results if each is not None]
    named: list[int | Source] = [-1 if each is None else Source("value", each) for each in results]
    names = (schema.name, schema.overload_name)
    return Step(True, names, [*numbers, len(results), *named], values)


def _argument(value: Any, type_name: str, place: Placed, device: torch.device) -> Iterator[Any]:
    if value is None:
        yield _NONE
    elif isinstance(value, Tensor):
        yield _VIEW
        yield from _view(value, place)
    elif isinstance(value, bool):
        yield from (_BOOL, value)
    elif isinstance(value, int) and type_name == "Tensor":
        yield from (_WHOLE, value)
    elif isinstance(value, float) and type_name == "Tensor":
        yield from (_NUMBER, _bits(value))
    elif isinstance(value, float) or (isinstance(value, int) and "float" in type_name):
        yield from (_FLOAT, _bits(value))
    elif isinstance(value, int):
        yield from (_INT, value)
    elif isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        yield from (_INT, _code(value))
    elif isinstance(value, torch.device) and value.type == device.type:
        yield _DEVICE
    elif isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        yield from (_VIEWS, len(value))
        for each in value:
            yield from _view(each, place)
    elif isinstance(value, list | tuple) and all(type(each) is int for each in value):
        yield from (_INTS, len(value), *value)
    else:
        raise UnplannableError(f"an operator takes {value!r}")


def _view(tensor: Tensor, place: Placed) -> Iterator[int | Source]:
    yield from place(tensor)
    yield _code(tensor.dtype)
    yield from (tensor.dim(), *tensor.shape, tensor.dim(), *tensor.stride())


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def _code(value: torch.dtype | torch.layout | torch.memory_format) -> int:
    if isinstance(value, torch.dtype):
        return torch.ops.qlora_plans.code(value, None, None)
    if isinstance(value, torch.layout):
        return torch.ops.qlora_plans.code(None, value, None)
    return torch.ops.qlora_plans.code(None, None, value)


def dtype_code(dtype: torch.dtype) -> int:
    """Return the number of a dtype in C++."""
    return _code(dtype)
