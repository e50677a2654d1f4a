"""Attributes that are replaced for a while and then put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_ABSENT = object()


@contextlib.contextmanager
def replaced(owner: object, **values: object) -> Iterator[None]:
    """Set `values` as attributes of a module, class or instance, and restore on leaving.

    Attributes that `owner` itself did not have (inherited ones included) are deleted again.
    """
    saved = {name: vars(owner).get(name, _ABSENT) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
