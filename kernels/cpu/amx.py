"""AMX: whether there is any, and the kernels that need it."""

from __future__ import annotations

import functools
import platform
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED, compiled, has_compiler

_one_at_a_time = threading.Lock()


@functools.cache
def available() -> bool:
    """Whether there is AMX, and a compiler, which may be too old for it."""
    if platform.system() != "Linux" or not torch.cpu._is_amx_tile_supported():
        return False
    return has_compiler() and torch.cpu._init_amx()


def start(files: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Has `kernel` built while this thread goes on."""
    threading.Thread(target=kernel, args=(files, arguments)).start()


def kernel(files: tuple[str, ...], arguments: tuple[str, ...]) -> Callable[..., Any] | None:
    """The function `kernel` of these C++ files, one behind the other, with `arguments` as in
    `compiled`; None where there is no AMX, or no compiler that knows it."""
    with _one_at_a_time:
        return _kernel(files, arguments)


@functools.cache
def _kernel(files: tuple[str, ...], arguments: tuple[str, ...]) -> Callable[..., Any] | None:
    if not available():
        return None
    from torch._inductor.exc import CppCompileError

    folder = Path(__file__).parent
    sources = [(folder / f"{each}.cpp").read_text() for each in ("tiles", *files)]
    try:
        return compiled("".join([VECTORISED, BFLOAT16, *sources]), arguments)
    except CppCompileError as error:
        message = (
            f"this CPU's AMX is not used for {files[-1]}, the compiler does not build it: {error}"
        )
        warnings.warn(message, stacklevel=2)
        return None
