"""Runs a graph and returns its results: outputs, and the gradients of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Results = dict[str, Tensor | None]
"""Outputs and gradients by readable names; None for a gradient that autograd left out."""


def outputs_and_gradients(
    graph: Callable[..., Any],
    names: Sequence[str],
    args: Sequence[Any],
    wide: torch.dtype | None,
) -> Results:
    """Run `graph` on `args` and return its outputs ("output 0", …) and gradients ("gradient of …").

    The gradients are those of the sum of all outputs times fixed random weights, with respect to
    every input that requires a gradient. names: the names of `args`. wide: the dtype that
    floating-point inputs are converted to, None for their own.
    """
    leaves: dict[str, Tensor] = {}
    values = []
    for name, arg in zip(names, args, strict=True):
        value = arg
        if isinstance(arg, Tensor):
            value = _converted(arg.detach(), wide)
            if arg.requires_grad:
                leaves[f"gradient of {name}"] = value.requires_grad_()
            # A clone of the leaf, or of the model's tensor: the graph may write to its inputs.
            value = value if _is_frozen(arg) else placed_as(arg, value.clone())
        values.append(value)
    with _undisturbed(args, wide):
        outputs = [o for o in tree_flatten(graph(*values))[0] if isinstance(o, Tensor)]
    del values
    results: Results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    generator = torch.Generator().manual_seed(0)
    weighted = []
    for output in outputs:
        if output.is_floating_point():
            # Rounded to bfloat16, so that the weights are exact in every dtype of a graph.
            weight = torch.randn(output.shape, generator=generator).to(torch.bfloat16).float()
            if output.requires_grad:
                weighted.append((output, weight.to(output.device, output.dtype)))
    if torch.is_grad_enabled():
        results |= dict.fromkeys(leaves)
        if weighted and leaves:
            roots, weights = zip(*weighted, strict=True)
            with _undisturbed(args, wide, autocast=False):
                gradients = torch.autograd.grad(
                    roots, list(leaves.values()), weights, allow_unused=True
                )
            results |= dict(zip(leaves, gradients, strict=True))
    return results


def placed_as(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, of the shape of `tensor`, with the strides of `tensor`.

    Compiled code takes them for granted. Where `tensor` is expanded, one element is repeated.
    """
    if value.stride() == tensor.stride():
        return value
    strides = tensor.stride()
    for dim, (size, stride) in enumerate(zip(tensor.shape, strides, strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    placed = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return placed.copy_(value).expand(tensor.shape)


def random_states(args: Sequence[Any]) -> list[Tensor]:
    """Return the states of the generators of the CPU and of the devices of `args`."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    on = sorted(devices, key=str)
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in on)]


def _converted(tensor: Tensor, wide: torch.dtype | None) -> Tensor:
    return tensor.to(wide) if wide is not None and tensor.is_floating_point() else tensor


def _is_frozen(arg: Tensor) -> bool:
    return isinstance(arg, nn.Parameter) and not arg.requires_grad


@contextmanager
def _undisturbed(
    args: Sequence[Any], wide: torch.dtype | None, autocast: bool = True
) -> Iterator[None]:
    """Seed the random state inside the context, and restore it afterwards.

    Autocast is off inside if `wide` is given or `autocast` is False, as for gradients.
    """
    devices = {arg.device for arg in args if isinstance(arg, Tensor)}
    with ExitStack() as stack:
        on = [device for device in devices if device.type == "cuda"]
        stack.enter_context(torch.random.fork_rng(devices=on))
        torch.manual_seed(0)
        if wide is not None or not autocast:
            for kind in {device.type for device in devices}:
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
