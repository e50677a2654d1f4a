"""Linears whose weight only another library's code can read, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_compile.hf.conv1d import LinearSite, features

_READABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def obstacle(linear: LinearSite) -> str | None:
    """Return why the weight of a Linear is not a matrix of numbers, None if it is one."""
    weight = linear.weight
    if not _is_plain(weight):
        return f"its weight is a {_name(weight)}, which only that class's code reads"
    if weight.dtype not in _READABLE:
        return f"its weight is stored as {weight.dtype}, which only another library's code reads"
    return None


def stored_as(weight: Tensor) -> str:
    """Return the name of a weight's dtype, or of its class if that is a subclass of Tensor."""
    return str(weight.dtype).removeprefix("torch.") if _is_plain(weight) else type(weight).__name__


def _is_plain(weight: Tensor) -> bool:
    """Whether torch itself computes with the memory of `weight`, without a subclass of Tensor."""
    own, plain = (getattr(each, "__torch_dispatch__") for each in (type(weight), Tensor))  # noqa: B009
    return own is plain and not _intervenes(type(weight))


def _intervenes(cls: type[Tensor]) -> bool:
    """Whether a class handles torch's functions itself. Modes, which are not the class's, do not
    count: transformers makes models inside one."""
    own: Any = cls.__torch_function__
    plain: Any = Tensor.__torch_function__
    return (
        own is not torch._C._disabled_torch_function_impl
        and getattr(own, "__func__", own) is not plain.__func__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is an nn.Linear or Conv1D that holds its weight under that name."""
    return isinstance(module, LinearSite) and isinstance(getattr(module, "weight", None), Tensor)


def acts_as_linear(module: nn.Module) -> bool:
    """Whether `module` is not `is_linear`, but holds tensors and has a Linear's sizes or name, as
    the layers of HQQ, GPTQ and AWQ do."""
    if is_linear(module) or not any(t is not None for t in _own_tensors(module)):
        return False
    return sizes(module) != (0, 0) or type(module).__name__.endswith("Linear")


def _own_tensors(module: nn.Module) -> tuple[Tensor | None, ...]:
    return *module._parameters.values(), *module._buffers.values()


def sizes(module: nn.Module) -> tuple[int, int]:
    """Return (N, K) of a module that is or acts as a Linear, with zeros for unknown sizes."""
    if isinstance(module, LinearSite):
        return features(module)
    for n, k in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        found = getattr(module, n, None), getattr(module, k, None)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return 0, 0


def reason(module: nn.Module) -> str:
    """Return why a module that acts as a Linear is left alone."""
    return f"it is a {_name(module)}, not an nn.Linear: only its own code reads its weight"


def _name(value: object) -> str:
    return f"{type(value).__module__.partition('.')[0]}'s {type(value).__name__}"
