"""HookWatch: whether the modules inside a block have hooks, asked in every call of the block."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat
from operator import contains, is_, itemgetter
from typing import Any

from torch import nn

from qlora_compile.capture.hooks import FORWARD, GLOBAL_HOOKS, OWN_HOOKS, has_hooks

_hooks_of = itemgetter(*OWN_HOOKS.values())

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


class HookWatch:
    """Looks for hooks inside one block. Most blocks never have any, and a full search takes a tenth
    of a small step's time, so `is_quiet` first tells cheaply whether a hook can have come since."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._quiet: _Quiet | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_quiet": None}

    def is_quiet(self) -> bool:
        """Whether there were no hooks at the last call of `has_hooks`, there are none now, and the
        modules are the same."""
        quiet = self._quiet  # other threads may take it away
        return quiet is not None and quiet.lasts()

    def has_hooks(self) -> bool:
        """Whether there are hooks, in the sense of `hooks.has_hooks`."""
        found = has_hooks(self._block)
        quiet = None if found else _Quiet.of(self._block)
        # `has_hooks` ignores some forwards on instances. `lasts` does not, so these blocks are
        # searched in every call.
        self._quiet = quiet if quiet is not None and quiet.lasts() else None
        return found


@dataclass
class _Quiet:
    """A block without hooks inside.

    states: the attributes of the modules that can be called. parents: the `_modules` of those that
    have any; children: what is in them. empty: all dictionaries of hooks, and the other `_modules`.
    Nobody replaces a `_modules`, and to look for it would take a third as long again.
    """

    states: list[dict[str, Any]]
    parents: list[dict[str, nn.Module | None]]
    children: list[nn.Module | None]
    empty: list[dict[Any, Any]]

    @classmethod
    def of(cls, block: nn.Module) -> _Quiet:
        modules = list(block.modules())
        states = [each.__dict__ for each in modules[1:] if not isinstance(each, _NEVER_CALLED)]
        hooks = [*chain.from_iterable(map(_hooks_of, states)), *GLOBAL_HOOKS.values()]
        parents = [each._modules for each in modules if each._modules]
        childless = [each._modules for each in modules if not each._modules]
        children = [*chain.from_iterable(map(dict.values, parents))]
        return cls(states, parents, children, [*hooks, *childless])

    def lasts(self) -> bool:
        # Each of these is a loop in C, over as little memory as possible: none of it is in a cache.
        if any(self.empty) or any(map(contains, self.states, repeat(FORWARD))):
            return False
        # A dictionary of hooks may have been replaced.
        if not all(map(is_, chain.from_iterable(map(_hooks_of, self.states)), self.empty)):
            return False
        return [*chain.from_iterable(map(dict.values, self.parents))] == self.children
