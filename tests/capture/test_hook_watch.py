"""A block that had no hooks is seen to have some, however they come."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
from torch import nn
from torch.nn.modules import module as nn_module

from qlora_compile.capture.hook_watch import HookWatch
from qlora_compile.capture.hooks import OWN_HOOKS, has_hooks

KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


def block() -> nn.Module:
    """With parts that hold others, parts that are called, and one that is not there."""
    whole = nn.Module()
    whole.first = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    whole.parts = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    whole.more = nn.ModuleList([nn.Linear(2, 2)])
    whole.register_module("nothing", None)
    return whole


def hook(*_: Any) -> None:
    return None


def hooked() -> nn.Linear:
    linear = nn.Linear(2, 2)
    linear.register_forward_hook(hook)
    return linear


def registering(kind: str, path: str) -> Callable[[Any], Any]:
    return lambda whole: getattr(whole.get_submodule(path), f"register_{kind}_hook")(hook)


def _giving(name: str) -> Callable[[Any], Any]:
    return lambda whole: setattr(whole.first[0], name, OrderedDict({7: hook}))


def _on_another_dictionary(whole: Any) -> Any:
    whole.first[0]._forward_hooks = OrderedDict()
    return whole.first[0].register_forward_hook(hook)


def _inserted(whole: Any) -> None:
    whole.more.insert(0, hooked())


WAYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"{kind} on {path}": registering(kind, path)
        for kind in KINDS
        for path in ("first", "more.0")
    },
    "written": lambda whole: whole.parts["a"]._forward_hooks.update({7: hook}),
    **{f"given as {name}": _giving(name) for name in OWN_HOOKS.values()},
    "on another dictionary": _on_another_dictionary,
    "on every module": lambda whole: nn_module.register_module_forward_hook(hook),
    "by attribute": lambda whole: setattr(whole, "late", hooked()),
    "in the place of another": lambda whole: setattr(whole.first, "0", hooked()),
    "in the place of none": lambda whole: setattr(whole, "nothing", hooked()),
    "by name": lambda whole: whole.parts.update({"b": hooked()}),
    "past names": lambda whole: whole.first._modules.update({"1": hooked()}),
    "inserted": _inserted,
    "below a leaf": lambda whole: whole.first[1].add_module("late", hooked()),
    "forward": lambda whole: setattr(whole.first[0], "forward", hook),
}


@pytest.mark.parametrize("way", WAYS)
def test_hooks_are_seen_however_they_come(way: str) -> None:
    whole = block()
    watch = HookWatch(whole)
    assert not watch.is_quiet()
    assert not watch.has_hooks()
    assert watch.is_quiet()
    handle = WAYS[way](whole)
    try:
        assert has_hooks(whole)
        assert not watch.is_quiet()
        assert watch.has_hooks()
        assert not watch.is_quiet()
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    if handle is not None:
        assert not watch.has_hooks()
        assert watch.is_quiet()


def test_hooks_elsewhere_and_on_the_block_itself_disturb_nothing() -> None:
    whole, other = block(), block()
    watch = HookWatch(whole)
    watch.has_hooks()
    for module in (whole, other.get_submodule("first")):
        module.register_forward_hook(hook)
    assert watch.is_quiet()


def test_a_forward_that_changes_nothing_is_looked_at_every_time() -> None:
    whole = block()
    linear: Any = whole.get_submodule("first.0")
    linear.forward = MethodType(type(linear).forward, linear)
    watch = HookWatch(whole)
    assert not watch.has_hooks()
    assert not watch.is_quiet()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_watches_the_copied_block(copied: Callable[[Any], Any]) -> None:
    watch = HookWatch(block())
    watch.has_hooks()
    watch = copied(watch)
    watch._block.first.register_forward_hook(hook)
    assert not watch.is_quiet()
    assert watch.has_hooks()
