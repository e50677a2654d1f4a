"""Whole weights, in one process, of a model that FSDP2, ZeRO-3 or tensor parallelism spreads."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qlora_compile.saving_errors import SpreadModelError

SAVED_ALONE = {
    "problem": "one process alone cannot save it",
    "remedy": "call qlora_compile.save(model, folder) in all processes, or pass a whole state_dict",
}
"""What SpreadModelError says of a process that would save alone."""


def is_spread(model: nn.Module) -> bool:
    """Whether this process holds only a part of some weight of `model`."""
    return any(_is_part(parameter) for parameter in model.parameters())


def whole_shape(weight: Any) -> tuple[int, ...]:
    """Return the shape of a weight that ZeRO-3 may have emptied until the next step."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def whole_adapters(model: Any) -> AbstractContextManager[bool]:
    """Do as `whole_weights` for what PEFT saves of a PeftModel, and leave the other weights spread.
    The base may be too large for one process."""
    if not is_spread(model):
        return nullcontext(True)
    state = model.state_dict(keep_vars=True)
    parts = (get_peft_model_state_dict(model, state, name) for name in model.peft_config)
    return whole_weights(model, {tensor for part in parts for tensor in part.values()})


@contextmanager
def whole_weights(model: nn.Module, chosen: Container[Tensor] | None = None) -> Iterator[bool]:
    """Give process 0 the whole weights of `model`, on the CPU, and yield whether this process has
    them. chosen: the parameters to gather; None for all.

    If the weights are spread, all processes must enter the context: together they gather one weight
    after another. Process 0 keeps what is gathered; the others go on. Inside the context the model
    cannot be called.
    """
    spread = [
        (module, name, parameter)
        for _, module, name, parameter in _parts(model)
        if chosen is None or parameter in chosen
    ]
    first = not spread or dist.get_rank() == 0
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in dict.fromkeys(parameter for *_, parameter in spread):  # tied ones once
        value = _gathered(parameter)
        if first:
            whole[parameter] = nn.Parameter(value.cpu(), parameter.requires_grad)
    with _in_place_of(spread if first else [], whole):
        yield first


@contextmanager
def given_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the weights of `state`, the whole state of `model`, in place of those that are spread.

    Inside the context the model cannot be called.

    Raises:
        SpreadModelError: `state` itself has parts of weights.
    """
    spread, whole = [], {}
    for key, module, name, parameter in _parts(model):
        if _is_part(state[key]):
            raise SpreadModelError(model=type(model).__name__, **SAVED_ALONE)
        spread.append((module, name, parameter))
        whole[parameter] = nn.Parameter(state[key], parameter.requires_grad)
    with _in_place_of(spread, whole):
        yield


_Place = tuple[nn.Module, str, nn.Parameter]


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield the spread weights: key in the state, module, name there, and parameter."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _is_part(parameter):
                yield f"{prefix}.{name}" if prefix else name, module, name, parameter


@contextmanager
def _in_place_of(
    spread: list[_Place], whole: Mapping[nn.Parameter, nn.Parameter]
) -> Iterator[None]:
    try:
        for module, name, parameter in spread:
            module._parameters[name] = whole[parameter]
        yield
    finally:
        for module, name, parameter in spread:
            module._parameters[name] = parameter


def _is_part(parameter: Any) -> bool:
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def _gathered(parameter: Any) -> Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
