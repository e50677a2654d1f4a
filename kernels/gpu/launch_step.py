"""Turns a launch into a step of a plan: the compiled kernel's parameters as Triton's own launcher
passes them, with the places of the pointers."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.plans.steps import Placed, Source, Step, UnplannableError

_CONSTANT, _POINTER, _MAP = range(3)

_BYTES = {
    **{"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8},
    **{"u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8},
}
_MAP_BYTES = 128

_UNTOLD = (
    ("num_ctas", 1, "clusters of thread blocks"),
    ("global_scratch_size", 0, "scratch memory of its own"),
    ("profile_scratch_size", 0, "scratch memory for profiling"),
    ("launch_cooperative_grid", False, "a cooperative launch"),
    ("launch_pdl", False, "a programmatic dependent launch"),
)
"""What a plan cannot tell a launch: an attribute of the kernel, its value for nothing to tell, and
its name for people."""

_MOST_SHARED = 228 * 1024
"""The bytes of shared memory beyond which Triton's launcher sets an attribute."""


def is_hooked() -> bool:
    """Whether somebody, such as Triton's profiler, is to be called at each launch, which only
    Triton's launcher does."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def launch_step(launch: Launch, compiled: Any, place: Placed) -> Step:
    """Return the step that starts `compiled`, which Triton has made of `launch`.

    Raises UnplannableError if a plan cannot hold what Triton's launcher would do.
    """
    metadata = compiled.metadata
    if metadata.target.backend != "cuda":
        raise UnplannableError(f"{metadata.name} is a kernel of {metadata.target.backend}")
    for attribute, nothing, wanted in _UNTOLD:
        if getattr(metadata, attribute, nothing) != nothing:
            raise UnplannableError(f"{metadata.name} needs {wanted}")
    if metadata.shared > _MOST_SHARED:
        raise UnplannableError(f"{metadata.name} needs {metadata.shared} bytes of shared memory")
    parameters = list(_parameters(launch, compiled, place))
    grid = (*launch.grid, 1, 1)[:3]
    threads = metadata.warp_size * metadata.num_warps
    numbers = [compiled.function, *grid, threads, metadata.shared, len(parameters)]
    for each in parameters:
        numbers += each
    return Step(False, (metadata.name,), numbers)


def _parameters(launch: Launch, compiled: Any, place: Placed) -> Iterator[Sequence[int | Source]]:
    """Yield [kind, bytes, …] of each parameter in the kernel's order."""
    given = launch.arguments | launch.constexprs
    descriptors = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    for name, annotated in compiled.src.signature.items():
        for kind, value in _flat(annotated, given[name]):
            if kind.startswith("tensordesc"):
                yield from _descriptor(value, next(descriptors, None), place)
            elif kind.startswith("*"):
                yield [_POINTER, 8, *place(value)]
            elif kind in ("fp32", "f32"):
                yield [_CONSTANT, 4, struct.unpack("<i", struct.pack("<f", value))[0]]
            elif kind in _BYTES:
                yield [_CONSTANT, _BYTES[kind], int(value)]
            else:
                raise UnplannableError(f"{compiled.metadata.name} takes a number of type {kind}")
    # The pointers to two scratch memories, which this kernel does not have.
    yield from ([_CONSTANT, 8, 0], [_CONSTANT, 8, 0])


def _flat(annotated: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield pairs of Triton's type and a value, without constexprs, from tuples one by one."""
    if isinstance(annotated, tuple):
        for part, each in zip(annotated, value, strict=True):
            yield from _flat(part, each)
    elif annotated != "constexpr":
        yield annotated, value


def _descriptor(
    descriptor: Any, meta: dict[str, Any] | None, place: Placed
) -> Iterator[Sequence[int | Source]]:
    """Yield a tensor map, and the shape and strides that follow it."""
    if meta is None or meta["fp4_padded"] or meta.get("is_im2col", False):
        raise UnplannableError("it uses a tensor descriptor that is not a plain tensor map")
    if getattr(descriptor, "round_f32_to_tf32", False):
        raise UnplannableError("it uses a tensor descriptor that rounds to tf32")
    numbers: list[int | Source] = [_MAP, _MAP_BYTES, *place(descriptor.base)]
    numbers += [TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["swizzle"]]
    numbers += [int(descriptor.padding == "nan"), meta["elem_size"], len(descriptor.shape)]
    sides = (descriptor.shape, descriptor.strides, meta["block_size"])
    for side in zip(*sides, strict=True):
        numbers += side
    yield numbers
    yield from ([_CONSTANT, 4, size] for size in descriptor.shape)
    yield from ([_CONSTANT, 8, stride] for stride in descriptor.strides)
