"""Launch: one call of a Triton kernel as data, so that it can be run, recorded and compiled."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton import language as tl

from qlora_compile.kernels.cpu.native_function import told_of_launch
from qlora_compile.kernels.gpu.built_cache import use_built_cache

if TYPE_CHECKING:
    from qlora_compile.kernels.plans.recording import Recorder

use_built_cache()

TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**arguments, **constexprs)` with its compile options.

    arguments: tensors, ints, floats, tensor descriptors, None, and tuples of these, by parameter
    name; the tensors may be on the meta device if the launch is only compiled.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compile_options(self) -> dict[str, Any]:
        """The compiler's options, that is, all that it gets beside the arguments."""
        # Contracting a product and a sum to one rounding changes decoded weights; Triton's default
        # differs between its versions.
        counts = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {"enable_fp_fusion": False} | self.options | counts

    def run(self) -> None:
        told_of_launch()
        if _recorder.launches is not None:
            _recorder.launches.append(self)
        elif all(self.grid):
            device = next(_tensors(self.arguments.values())).device
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                self._run(device)
            else:
                with torch.cuda.device(device):
                    self._run(device)

    def _run(self, device: torch.device) -> None:
        compiled = self._started(device)
        if _recorder.plan is not None:
            _recorder.plan.launched(self, compiled)

    def _started(self, device: torch.device) -> Any:
        """Launch on the current device, and return what Triton has compiled.

        Triton's JIT looks this up by the text of all options and by every parameter: from Python a
        launch would then take 71 µs instead of 37. Plans do not make this cache superfluous. No
        plan starts a key's first two calls, so no call of ragged batches, and nothing on ROCm,
        without a compiler, under launch hooks, or while variants are measured.
        """
        key = (
            *(id(self.kernel), device, self.num_warps, self.num_stages, *self.options.items()),
            *map(_specialisation, self.arguments.values()),
            *self.arguments,
            *self.constexprs.values(),
            *self.constexprs,
        )
        known = _compiled.get(key)
        if known is not None:
            compiled, names = known
            given = self.arguments | self.constexprs
            compiled[(*self.grid, 1, 1)[:3]](*[given[name] for name in names])
            return compiled
        compiled = self.kernel[self.grid](
            **self.arguments, **self.constexprs, **self.compile_options
        )
        # The interpreter returns nothing. On AMD a tensor's size, too, decides what is compiled.
        if compiled is not None and torch.version.hip is None:
            _compiled[key] = compiled, tuple(self.kernel.arg_names)
        return compiled


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among a launch's arguments, also those in tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[str, ...]]] = {}
"""Triton's CompiledKernels, with their parameters' names, by all that they were compiled for."""


def _specialisation(argument: Any) -> Any:
    """Return the properties of an argument, not a constexpr, that make Triton compile anew."""
    if isinstance(argument, tuple):
        return type(argument), *map(_specialisation, argument)
    if argument is None or isinstance(argument, float):
        return type(argument)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    return argument.base.dtype, *argument.block_shape


class _Recorder(threading.local):
    """Who records the launches of one thread, instead of running them or, for a plan, as well."""

    launches: list[Launch] | None = None
    plan: Recorder | None = None


_recorder = _Recorder()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches that this thread makes inside the context, instead of running them."""
    before, launches = _recorder.launches, []
    _recorder.launches = launches
    try:
        yield launches
    finally:
        _recorder.launches = before


@contextmanager
def recording_plan(recorder: Recorder) -> Iterator[None]:
    """Tell `recorder` of each launch that this thread makes inside the context."""
    before, _recorder.plan = _recorder.plan, recorder
    try:
        yield
    finally:
        _recorder.plan = before


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Return x itself, or a copy if the elements of a row are not adjacent, or rows overlap."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
