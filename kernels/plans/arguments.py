"""The arguments of a fused op: its tensors, and its name for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qlora_compile.kernels.call import Call


def told_of(name: str, arguments: Sequence[Any]) -> str:
    """Describe the call for people."""
    call, x = Call.parse(arguments[-1]), arguments[-4]
    layout, columns = call.linears[0].layout, "+".join(map(str, call.columns))
    stored = layout.format if layout.quantized else "plain"
    return f"{name} of {list(x.shape)} and {stored} weights [{columns}, {call.k}] on {x.device}"


def given_tensors(arguments: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments of a fused op, in order."""
    found: list[Tensor] = []
    for each in arguments:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found += each
    return found


def with_tensors(arguments: Sequence[Any], tensors: Any) -> list[Any]:
    """Return the arguments with other tensors in place of theirs, in `given_tensors`' order."""
    replaced: list[Any] = []
    for each in arguments:
        if isinstance(each, Tensor):
            replaced.append(next(tensors))
        elif isinstance(each, list | tuple):
            replaced.append([next(tensors) for _ in each])
        else:
            replaced.append(each)
    return replaced
