"""Guards: which of Dynamo's checks a compiled block repeats in every call.

Dynamo checks everything that it read while it traced a block, about a thousand things, each time it
runs the block. Kept are inputs, shapes, modes, modules and their attributes, parameters, adapters,
and the functions of Python that the block calls. Left out is what nothing changes between two
calls, and what is checked otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from qlora_compile.modules.packed import PackedModule

_GLOBAL_HOOKS = re.compile(r"\._global_(forward|backward)_(pre_)?hooks\b")
"""Whoever calls a block looks for hooks first: `HookWatch`."""

_MODULE_DICTIONARY = re.compile(r"\._(modules|parameters|buffers)$")
"""Of an nn.Module, always a dict. What is in it is checked by itself."""

_DEFAULTS = re.compile(r"\.__(kw)?defaults__\b")
"""Of a function; Dynamo elsewhere assumes, too, that they stay (assume_dunder_attributes_...)."""


def kept_guards(module: nn.Module, entries: Sequence[Any]) -> list[bool]:
    """Whether each guard that Dynamo made for a call of the block `module` is checked.

    entries: as torch.compile's option "guard_filter_fn" is given them.
    """
    planes = {id(plane) for plane in _side_planes(module.modules())}
    return [_is_kept(entry, planes) for entry in entries]


def _side_planes(modules: Iterable[nn.Module]) -> Iterable[object]:
    """Planes whose dtypes and shapes follow from a Layout, and that move only with the codes. Both,
    Layout and codes, are checked."""
    for module in modules:
        if isinstance(module, PackedModule):
            yield from module.tensors[1:]


def _is_kept(entry: Any, planes: set[int]) -> bool:
    name, kind = entry.name, entry.guard_type
    if id(entry.value) in planes or ".side_names" in name:
        return False
    if not entry.is_global:
        return kind != "TYPE_MATCH" or not _MODULE_DICTIONARY.search(name)
    if isinstance(entry.value, ModuleType) or name.startswith("G['__builtins_dict"):
        # What is read from a module is checked by itself.
        return False
    if ".os.environ" in name:
        return kind.startswith("DICT")
    # Of torch's functions those that others replace are in nn.functional.
    own = ".torch." in name and ".functional." not in name
    return not (own or _GLOBAL_HOOKS.search(name) or _DEFAULTS.search(name))
