"""Forwards on a module's instance, which replace the forward of its class.

Trainers and other libraries put them there, and so do accelerate's hooks, which keep the forward
that they call in `_old_forward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import MethodType
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from torch import nn


def plain_function(function: Any) -> Any:
    """Return the function behind partial objects and bound methods."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__func__", function)


def qualified_name(function: Any) -> str:
    """Return module and name of `function`, or of its class if it has no name."""
    function = plain_function(function)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _hook_code() -> object:
    """Return the code object that all of accelerate's forwards share, read from one made here."""
    return plain_function(add_hook_to_module(nn.Module(), ModelHook()).forward).__code__


_HOOK_CODE = _hook_code()


def _is_of_accelerate(forward: object) -> bool:
    return getattr(plain_function(forward), "__code__", None) is _HOOK_CODE


class PlacedHook(AlignDevicesHook):
    """The hook of a module that is on one device with its whole block, so that nothing is moved.

    Dynamo cannot trace accelerate's moving. Compiled code does without it.
    """

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return args, kwargs
        return super().pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output if torch.compiler.is_compiling() else super().post_forward(module, output)


def place_hooks(block: nn.Module) -> None:
    """Let compiled code run through those of accelerate's hooks inside `block` that have nothing to
    do: the block's own hook has moved the inputs to the one device of all of them."""
    own = {_device(hook) for hook in _hooks(block) if _places(hook)}
    devices = {tensor.device for tensor in (*block.parameters(), *block.buffers())} if own else own
    if not own or devices != own:
        return
    for module in block.modules():
        hook: Any = module.__dict__.get("_hf_hook")
        forward: Any = module.__dict__.get("forward")
        placed = _places(hook) and devices == {_device(hook)} and _is_of_accelerate(forward)
        if placed and module is not block:
            hook.__class__ = PlacedHook
            # Dynamo would compile each layer separately, because it identifies partials by id.
            module.__dict__["forward"] = MethodType(plain_function(forward), module)


def _places(hook: ModelHook | None) -> bool:
    return type(hook) is AlignDevicesHook and not hook.offload


def _device(hook: Any) -> torch.device | None:
    return None if hook.execution_device is None else torch.device(hook.execution_device)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate takes the tensors of `module` away between calls."""
    return any(getattr(hook, "offload", False) is True for hook in _hooks(module))


def _hooks(module: nn.Module) -> Iterable[ModelHook]:
    hook = module.__dict__.get("_hf_hook")
    return hook.hooks if isinstance(hook, SequentialHook) else () if hook is None else (hook,)


def move_hook(module: nn.Module, successor: nn.Module) -> None:
    """Give `successor` accelerate's hook of `module`."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        add_hook_to_module(successor, hook)


class CompiledForward:
    """A forward on the instance that computes the same as the one it replaces. replaced: the
    earlier forward on the instance, if any."""

    replaced: Callable[..., Any] | None = None


def forward_place(module: nn.Module) -> str:
    """Return the attribute that holds the forward to replace: the one that accelerate's hook calls,
    if there is a hook, else the one that a call of the module runs."""
    return "_old_forward" if _is_of_accelerate(module.__dict__.get("forward")) else "forward"


def replaced_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that someone other than accelerate and us put on the instance."""
    forward = module.__dict__.get(forward_place(module))
    if isinstance(forward, CompiledForward):
        forward = forward.replaced
    # accelerate leaves the class's own forward there when it takes a hook off.
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def called_forward(module: nn.Module) -> Callable[..., Any] | None:
    """Return the forward on the instance that compiled code of a block has to run for `module`."""
    placed = type(module.__dict__.get("_hf_hook")) is PlacedHook
    if _is_of_accelerate(module.__dict__.get("forward")) and not placed:
        return module.__dict__["forward"]
    return replaced_forward(module)


def bound_forwards(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules on which an attribute binds the class's own forward."""
    return [m for m in modules if forward_place(m) in m.__dict__ and replaced_forward(m) is None]


def bind_forward(module: nn.Module) -> None:
    """Bind the forward of the class that `module` has now."""
    module.__dict__[forward_place(module)] = type(module).forward.__get__(module)


def reached(module: nn.Module) -> Iterator[object]:
    """Yield the forwards of `module`, and what they hold and may call."""
    pending: list[Any] = [module.__dict__.get(name) for name in ("forward", "_old_forward")]
    seen: set[int] = set()
    for each in pending:
        if callable(each) and not isinstance(each, nn.Module) and id(each) not in seen:
            seen.add(id(each))
            yield each
            if isinstance(each, functools.partial):
                pending += [each.func, *each.args]
            for cell in getattr(each, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    pending.append(cell.cell_contents)
            pending += getattr(each, "__dict__", {}).values()
