"""Hooks on modules, and forwards that are replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import strategies as st
from torch import Tensor, nn

from tests.life.model_operations import OuterCompile
from tests.life.pair import BLOCK, Hooked, Pair, Strategy

HEAD = "base_model.model.lm_head"


@dataclass(frozen=True)
class Hook:
    """A hook on any module: it halves what it is given, or looks at it"""

    module: str
    kind: str
    edits: bool

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        return st.builds(
            Hook,
            st.sampled_from(hookable(pair)),
            st.sampled_from(("forward", "forward_pre", "full_backward", "full_backward_pre")),
            st.booleans(),
        )

    def apply(self, pair: Pair) -> None:
        number = len(pair.hooks)
        hooked = Hooked(f"{number} {self.kind} {self.module}")
        for model, seen in zip((pair.stock, pair.ours), pair.seen, strict=True):
            module: Any = model.get_submodule(self.module)
            hook = getattr(self, f"_{self.kind}")(seen, hooked.name)
            options = {"with_kwargs": True} if self.kind == "forward_pre" else {}
            hooked.handles.append(getattr(module, f"register_{self.kind}_hook")(hook, **options))
        pair.hooks.append(hooked)

    def _forward(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, args, output):
            return _first_replaced(output, _halved)

        def look(module, args, output):
            seen[name] = _first(output).detach()

        return edit if self.edits else look

    def _forward_pre(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, args, kwargs):
            if args:
                return (args[0] * 0.5, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": kwargs["hidden_states"] * 0.5}

        def look(module, args, kwargs):
            seen[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        return edit if self.edits else look

    def _full_backward(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, grad_input, grad_output):
            return tuple(map(_halved, grad_input))

        def look(module, grad_input, grad_output):
            seen[name] = grad_output[0].detach()

        return edit if self.edits else look

    def _full_backward_pre(self, seen: dict[str, Tensor], name: str) -> Callable[..., Any]:
        def edit(module, grad_output):
            return tuple(map(_halved, grad_output))

        def look(module, grad_output):
            seen[name] = grad_output[0].detach()

        return edit if self.edits else look


@dataclass(frozen=True)
class Unhook:
    """handle.remove()"""

    number: int

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        kept = _keeps_hooks(pair)
        on = [
            number
            for number, hooked in enumerate(pair.hooks)
            if hooked.handles and not (kept and HEAD in hooked.name)
        ]
        return st.builds(Unhook, st.sampled_from(on)) if on else None

    def apply(self, pair: Pair) -> None:
        for handle in pair.hooks[self.number].handles:
            handle.remove()
        pair.hooks[self.number].handles.clear()


@dataclass(frozen=True)
class ReplaceForward:
    """Another forward on the instance of a module inside a block, as Liger does, or no longer"""

    module: str

    @staticmethod
    def drawn(pair: Pair) -> Strategy | None:
        paths = ("mlp", "input_layernorm", "self_attn.o_proj")
        return st.sampled_from(
            [f"{BLOCK}.{layer}.{path}" for layer in (0, 1) for path in paths]
        ).map(ReplaceForward)

    def apply(self, pair: Pair) -> None:
        def replace(model: Any) -> None:
            module = model.get_submodule(self.module)
            if "forward" in module.__dict__:
                del module.forward
            else:
                module.forward = partial(_halved_forward, module)

        pair.both(replace)


def hookable(pair: Pair) -> list[str]:
    """Return the modules that a forward may call with a tensor: no containers, no rotary
    embedding."""
    left = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)
    head = () if _keeps_hooks(pair) else (HEAD,)
    return [
        name
        for name, module in pair.stock.named_modules()
        if name.startswith((f"{BLOCK}.0", f"{BLOCK}.1", *head))
        or name == "base_model.model.model.norm"
        if not isinstance(module, left)
    ]


def _keeps_hooks(pair: Pair) -> bool:
    """Whether torch.compile may have traced the head, which keeps the hooks of that time: by
    torch's default, no hook is guarded."""
    return any(isinstance(each, OuterCompile) for each in pair.history)


def _first_replaced(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return (_first_replaced(value[0], new), *value[1:])
    return new(value)


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple) and value else value


def _halved(value: Tensor | None) -> Any:
    return None if value is None else value * 0.5


def _halved_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs) * 0.5
