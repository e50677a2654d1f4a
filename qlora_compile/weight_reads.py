"""Weight reads: finds Linears whose weight a model reads without calling them.

They must not be packed: the model would read codes instead of the weight.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Mapping
from types import FunctionType

from torch import nn

from qlora_compile.hf.replaced_forward import plain_function, replaced_forward

_PREPARING = ("__init__", "reset_", "init_", "_init", "tie_", "_tie")
"""Beginnings of the names of methods that only prepare a model, before anything is quantised."""

_DESCRIPTIONS = ("dtype", "device", "shape", "ndim", "numel", "size")


def read_by_parent(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of modules whose weight a method of their parent module reads, or a forward
    that stands on the parent's instance.

    For example, Mamba computes `self.dt_proj.weight @ x`.
    """
    return {
        f"{name}.{child}" if name else child
        for name, module in modules.items()
        for child in _read_weights(type(module)) | _read_on_instance(module)
        if child in module._modules
    }


@functools.cache
def _read_weights(module_class: type[nn.Module]) -> frozenset[str]:
    found = set()
    for owner in module_class.__mro__:
        if not issubclass(owner, nn.Module):
            continue
        for name, member in vars(owner).items():
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and not name.startswith(_PREPARING):
                found |= _read_by(function)
    return frozenset(found)


def _read_on_instance(module: nn.Module) -> set[str]:
    function = plain_function(replaced_forward(module))
    return _read_by(function, owner=None) if isinstance(function, FunctionType) else set()


def _read_by(function: FunctionType, owner: str | None = "self") -> set[str]:
    """Return every NAME in `owner.NAME.weight`, unless only dtype, shape or the like are read.

    owner: the name of a variable; None for any expression before NAME.
    """
    if "weight" not in function.__code__.co_names:
        return set()
    names = [
        step.argval if step.opname in ("LOAD_FAST", "LOAD_ATTR", "LOAD_METHOD") else None
        for step in dis.get_instructions(function)
        if step.opname != "CACHE"
    ]
    following = [*names[3:], None]
    return {
        name
        for first, name, last, then in zip(names, names[1:], names[2:], following, strict=False)
        if last == "weight" and owner in (None, first) and name and then not in _DESCRIPTIONS
    }
