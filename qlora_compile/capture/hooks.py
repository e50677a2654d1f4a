"""The hooks and replaced forwards that the modules inside a block have at the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from qlora_compile.hf.replaced_forward import called_forward, plain_function, qualified_name

FORWARD = "forward"
"""The kind of a forward on the instance, which counts as a hook."""

GLOBAL_HOOKS = {
    "global forward hook": _global_forward_hooks,
    "global forward pre-hook": _global_forward_pre_hooks,
    "global backward hook": _global_backward_hooks,
    "global backward pre-hook": _global_backward_pre_hooks,
}
OWN_HOOKS = {
    "forward hook": "_forward_hooks",
    "forward pre-hook": "_forward_pre_hooks",
    "backward hook": "_backward_hooks",
    "backward pre-hook": "_backward_pre_hooks",
}


@dataclass(frozen=True)
class Hook:
    """A hook on the module at a path inside a block; a global one has the path "every module".

    A forward that stands on a module's instance counts as one; that of the block has the path "".
    """

    kind: str
    module: str
    function: Callable[..., Any]

    @property
    def is_backward(self) -> bool:
        return "backward" in self.kind

    @property
    def unbound(self) -> Any:
        """The plain function behind partial objects and bound methods."""
        return plain_function(self.function)

    @property
    def code(self) -> object:
        """The code object of the hook; hooks of one code differ only in the values they hold."""
        return getattr(self.unbound, "__code__", type(self.unbound))

    def __str__(self) -> str:
        name = getattr(self.unbound, "__qualname__", type(self.unbound).__qualname__)
        if self.kind == FORWARD:
            name = qualified_name(self.function)
        return f"the {self.kind} {name} on {self.module or 'the block itself'}"


def has_hooks(block: nn.Module) -> bool:
    """Whether a module inside `block` has hooks, or a forward of its own, that its call runs.

    The block's own hooks do not count: they run before and after the forward that is compiled.
    The loop below takes a third of the time of `Module.modules`.
    """
    for hooks in GLOBAL_HOOKS.values():
        if hooks:
            return True
    modules = list(block._modules.values())
    for module in modules:
        if module is None:
            continue
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return True
        if FORWARD in state and called_forward(module) is not None:
            return True
        if children := state["_modules"]:
            modules += children.values()  # the loop also visits what is appended
    return False


def hooks_inside(block: nn.Module) -> tuple[Hook, ...]:
    """Return the hooks that `has_hooks` looks for."""
    return tuple(_hooks(block))


def _hooks(block: nn.Module) -> Iterator[Hook]:
    for kind, hooks in GLOBAL_HOOKS.items():
        for function in hooks.values():
            yield Hook(kind, "every module", function)
    for path, module in block.named_modules():
        if module is not block:
            forward = called_forward(module)
            if forward is not None:
                yield Hook(FORWARD, path, forward)
            for kind, name in OWN_HOOKS.items():
                for function in getattr(module, name).values():
                    yield Hook(kind, path, function)
