"""NativeFunction: a compiled C++ function, and who records its calls."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

_NUMBERS = {"int64_t": ctypes.c_int64, "float": ctypes.c_float}


class Recorder(Protocol):
    """Whoever is told of each call, and of what cannot be repeated."""

    def called(self, function: NativeFunction, arguments: Sequence[Any]) -> None: ...
    def stopped(self, reason: str) -> None: ...


class _Recording(threading.local):
    recorder: Recorder | None = None


_recording = _Recording()


class NativeFunction:
    """The C++ function `kernel` of a library, called with a tensor for each pointer.

    bound: as Inductor binds it to Python. types: the C++ types of its parameters.
    """

    def __init__(self, bound: Callable[..., Any], types: Sequence[str]) -> None:
        self.types = tuple(types)
        self._bound = bound

    def __call__(self, *arguments: Any) -> None:
        self._bound(*arguments)
        if _recording.recorder is not None:
            _recording.recorder.called(self, arguments)

    @functools.cached_property
    def of_addresses(self) -> Callable[..., None]:
        """The same function, called with an address for each pointer."""
        library: Any = self._bound.__self__  # type: ignore[attr-defined]
        function = ctypes.CDLL(library.__file__).kernel
        function.restype = None
        function.argtypes = [_NUMBERS.get(each, ctypes.c_void_p) for each in self.types]
        return function


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of each call that this thread makes inside the context."""
    before, _recording.recorder = _recording.recorder, recorder
    try:
        yield
    finally:
        _recording.recorder = before


def told_of_launch() -> None:
    """Tell whoever records here that a Triton kernel ran, which only a plan can repeat."""
    if _recording.recorder is not None:
        _recording.recorder.stopped("it launches a Triton kernel")
