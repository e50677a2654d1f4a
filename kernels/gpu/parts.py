"""Parts: equal work for several Linears in one launch, each with its own operands."""

# Inside kernels constexprs are plain values and tensors take operators: not as typed.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import triton
import triton.language as tl
from torch import Tensor

Part = TypeVar("Part")


@triton.jit
def pick(values, part, PARTS: tl.constexpr):
    """Return values[part] of a tuple of PARTS pointers of one type, or of integers."""
    value = values[0]
    for i in tl.static_range(1, PARTS):
        # Keeps the alignment that all pointers share known to the compiler.
        value = tl.where(part == i, values[i], value)
    return value


def launched_together(
    parts: Sequence[Part],
    key: Callable[[Part], Hashable],
    launch: Callable[[Sequence[Part]], Sequence[Any]],
) -> list[Any]:
    """Return the results of `launch` for `parts`, launched together if they have the same `key`."""
    alike: dict[Hashable, list[int]] = {}
    for index, part in enumerate(parts):
        alike.setdefault(key(part), []).append(index)
    results: list[Any] = [None] * len(parts)
    for indices in alike.values():
        found = launch([parts[index] for index in indices])
        for index, result in zip(indices, found, strict=True):
            results[index] = result
    return results


def all_or_none(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...] | None:
    """Return a kernel's argument: a tensor of each part, or None if no part has one."""
    found = tuple(tensor for tensor in tensors if tensor is not None)
    return found or None
