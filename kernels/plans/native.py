"""The C++ that replays plans: built in a thread, kept in Inductor's cache folder, then installed as
the kernels of the fused ops on a GPU. Until then, and without a compiler, Python starts kernels.

No prebuilt C++ is shipped. Only by torch's stable ABI could one file serve several versions of
torch, and that ABI has no redispatching below autograd, which fused calls need. It also allocates a
handle on the heap for every tensor of a call.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from qlora_compile.kernels.cpu.toolchain import for_this_machine, has_compiler
from qlora_compile.kernels.cpu.torn_files import remove_torn_files
from qlora_compile.kernels.library import REGISTERED

PLANNED = (
    *("qlora_linear", "qlora_linear_backward"),
    *("qlora_experts", "qlora_experts_backward"),
)
"""The ops that plans are made for."""

_SOURCES = ("plan.cpp", "table.cpp")

_SLOW = "Python starts all kernels, which makes small batches wait"


class _State:
    """The state of the C++ in this process. is_hooked: says whether somebody hooks into Triton's
    launcher now; hooked: its last answer. obstacle: why the C++ is not used, though it could."""

    started = False
    built = False
    installed = False
    hooked = False
    is_hooked: Callable[[], bool] = staticmethod(lambda: False)
    obstacle: str | None = None


_state = _State()


def start() -> None:
    """Have the C++ built in another thread if there is an NVIDIA GPU, which plans are for."""
    if _state.started or not torch.cuda.is_available():
        return
    _state.started = True
    # Two threads that import Inductor at once may find each other's modules half made.
    if torch.version.hip:
        _state.obstacle = f"{_SLOW}: plans start kernels of CUDA, and this is ROCm"
    elif has_compiler():
        from torch._inductor import codecache  # noqa: F401

        threading.Thread(target=_build, name="plans", daemon=True).start()
    else:
        _state.obstacle = f"{_SLOW}: there is no C++ compiler"


def heed() -> None:
    """Install the C++ once it is built, and switch it off while something hooks Triton's launcher.

    Call this before a block runs. Nothing is installed during a backward, as the kernels of an op
    must not be replaced while the op is called.
    """
    if not _state.installed:
        if not _state.built or torch._C._current_graph_task_id() != -1:
            return
        install("CUDA")
    if _state.is_hooked() != _state.hooked:
        _state.hooked = not _state.hooked
        torch.ops.qlora_plans.enable(not _state.hooked)


def install(key: str, *, compares: bool = True) -> None:
    """Install plans for the devices of a dispatch key, once, building the C++ if necessary.

    compares: whether a plan's first replay is compared with the results of Python's launches.
    """
    import qlora_compile.kernels.experts.op
    import qlora_compile.kernels.op  # noqa: F401  # both register what is installed here
    from qlora_compile.kernels.gpu.launch_step import is_hooked
    from qlora_compile.kernels.plans.first_use import recorded

    if _state.installed:
        return
    _load()
    twins = _twins()
    for name in PLANNED:
        op = REGISTERED[name]
        computes = {"python": op.compute, "recorded": recorded(name, op.compute, compares)}
        for suffix, compute in computes.items():
            twins.define(f"{name}_{suffix}({op.operands}) -> Tensor[]")
            twins.impl(f"{name}_{suffix}", compute, "CompositeExplicitAutograd")
        if op.with_autograd is not None:
            twins.impl(f"{name}_python", op.with_autograd, "Autograd", with_keyset=True)
        torch.ops.qlora_plans.install(name, key, op.with_autograd is not None)
    _state.is_hooked = is_hooked
    _state.installed = True


def forget() -> None:
    """Drop all plans, because the choice of variants may have changed."""
    if _state.installed:
        torch.ops.qlora_plans.clear()


@contextmanager
def off() -> Iterator[None]:
    """Have Python start all kernels inside the context."""
    before = not _state.installed or torch.ops.qlora_plans.enable(False)
    try:
        yield
    finally:
        if _state.installed:
            torch.ops.qlora_plans.enable(before)


def report() -> list[str]:
    """Return why Python starts kernels instead of plans, for people; empty if plans start all."""
    found = [] if _state.obstacle is None else [_state.obstacle]
    if _state.hooked:
        found.append(f"{_SLOW}: something hooks into Triton's launcher")
    if _state.installed:
        counted = Counter(torch.ops.qlora_plans.refusals())
        found += [f"Python starts the kernels of {reason}" for reason in counted]
    return found


def _build() -> None:
    from torch._inductor.exc import CppCompileError

    try:
        _load()
    except (CppCompileError, OSError) as error:
        _state.obstacle = f"{_SLOW}: {error}"
    else:
        _state.built = True


@functools.cache
def _twins() -> torch.library.Library:
    """Return the library of the ops in Python that C++ calls."""
    return torch.library.Library("qlora_plans", "FRAGMENT")


@functools.cache
def _load() -> None:
    from torch._inductor.codecache import CppCodeCache

    remove_torn_files()
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.submodule_search_locations is not None
    include = Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "include"
    source = "".join(Path(__file__).with_name(name).read_text() for name in _SOURCES)
    CppCodeCache.load(for_this_machine(source), "cpu", extra_flags=(f"-isystem{include}",))
