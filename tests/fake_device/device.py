"""An imaginary GPU: tensors on the CPU count as tensors on it, Triton compiles for it, and what
Triton's own launcher passes to the driver is recorded, but nothing is launched.

The driver is `libcuda.c`. Results of kernels stay whatever their memory held. A process can either
launch here or interpret kernels, so tests use this device in separate processes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.driver import driver

from bench.static.occupancy import MULTIPROCESSORS
from qlora_compile.kernels.cpu import tapes
from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.kernels.gpu.target import assuming

SOURCE = Path(__file__).with_name("libcuda.c")

LAUNCH_SECONDS = 2.2e-6
"""What the driver of a real GPU takes for a launch, to be charged for each."""


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("parameters", ctypes.c_int),
        ("offset", ctypes.c_int * 512),
        ("size", ctypes.c_int * 512),
        ("bytes", ctypes.c_int),
    )


class _Recorded(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(ctypes.c_ubyte)),
    )


@dataclass(frozen=True)
class RecordedLaunch:
    """The arguments of `cuLaunchKernelEx`.

    kernel: its name; function: the handle it was loaded as. grid, block: of CTAs and threads.
    shared: bytes of dynamic shared memory. attributes: how many launch attributes there were.
    parameters: the bytes of each, in the kernel's order, the ones that Triton adds among them.
    """

    kernel: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: int
    stream: int
    parameters: tuple[bytes, ...]


class FakeDevice:
    """The device inside `fake_device`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @property
    def launched(self) -> int:
        """Launches so far, those that failed among them."""
        return self._library.stub_launched()

    @property
    def loaded(self) -> int:
        """Kernels that were loaded so far."""
        return self._library.stub_loaded()

    def charge(self, seconds: float = LAUNCH_SECONDS) -> None:
        """Have every later launch keep its thread busy for so long; 0 costs nothing."""
        self._library.stub_charge(round(seconds * 1e9))

    def fail(self, error: int, after: int = 0) -> None:
        """Have one launch, after so many that succeed, return a CUDA error such as 719."""
        self._library.stub_fail(after, error)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Have the driver say, inside the context, that every stream is being captured."""
        self._library.stub_capture(1)
        try:
            yield
        finally:
            self._library.stub_capture(0)

    @contextmanager
    def recording(self) -> Iterator[list[RecordedLaunch]]:
        """Yield a list that receives the body's launches, of all threads, once the body ends."""
        launches: list[RecordedLaunch] = []
        self._library.stub_record(1)
        try:
            yield launches
        finally:
            self._library.stub_record(0)
            count = self._library.stub_recorded()
            launches += (self._recorded(number) for number in range(count))

    def _recorded(self, number: int) -> RecordedLaunch:
        entry = self._library.stub_recorded_at(number).contents
        kernel = entry.kernel.contents
        block = bytes(entry.parameters[: kernel.bytes])
        places = list(zip(kernel.offset, kernel.size, strict=True))[: kernel.parameters]
        return RecordedLaunch(
            kernel=kernel.name.decode(),
            function=ctypes.addressof(kernel),
            grid=tuple(entry.grid),
            block=tuple(entry.block),
            shared=entry.shared,
            attributes=entry.attributes,
            stream=entry.stream or 0,
            parameters=tuple(block[start : start + size] for start, size in places),
        )


class FakeDriver(CudaDriver):
    """Triton's own driver and launcher, over the library that is loaded, for a given target."""

    def __init__(self, target: GPUTarget) -> None:
        # Not the base class's: it would ask torch, which sees no GPU.
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(int(self.target.arch), 10)


@contextmanager
def fake_device(target: str = "sm_90") -> Iterator[FakeDevice]:
    """Let tensors on the CPU count as tensors on a GPU of NVIDIA's `target` inside the context, in
    this thread; other threads add `assuming(target, kind="cpu")`.

    Needs a process whose kernels were not decorated for Triton's interpreter.
    """
    library = _library()
    gpu = TARGETS[target]
    library.stub_set_device(*divmod(int(gpu.arch), 10), MULTIPROCESSORS[target].shared_bytes)
    # Tapes are for CPUs, which this one does not count as.
    with knobs.nvidia.scope(), assuming(target, kind="cpu"), tapes.off():
        knobs.nvidia.libcuda_path = str(_folder())
        before, active = driver._active, FakeDriver(gpu)
        driver.set_active(active)
        try:
            yield FakeDevice(library)
        finally:
            driver._active = before


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the library, built if necessary and loaded. Whoever later asks for libcuda.so.1 gets
    this library, as the loader identifies libraries by name."""
    library = ctypes.CDLL(str(_folder() / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    library.stub_recorded_at.restype = ctypes.POINTER(_Recorded)
    for name in ("stub_launched", "stub_loaded", "stub_recorded"):
        getattr(library, name).restype = ctypes.c_long
    library.stub_charge.argtypes = (ctypes.c_long,)
    library.stub_fail.argtypes = (ctypes.c_long, ctypes.c_int)
    library.stub_recorded_at.argtypes = (ctypes.c_long,)
    return library


@functools.cache
def _folder() -> Path:
    """Return the folder that the library was built into, one for each source and compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    include = Path(triton.backends.nvidia.__file__).parent / "include"
    command = [
        *(get_cpp_compiler(), "-x", "c", "-std=c11", "-O2", "-D_GNU_SOURCE", "-shared", "-fPIC"),
        *(f"-I{include}", "-Wl,-soname,libcuda.so.1", str(SOURCE)),
    ]
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(command).encode()).hexdigest()[:16]
    folder = Path(cache_dir()) / f"fake_libcuda_{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        # Another process may be building the same: the last one to finish replaces the file.
        built = folder / f"{os.getpid()}.so"
        subprocess.run([*command, "-o", str(built)], check=True)
        link = folder / f"{os.getpid()}.link"
        link.symlink_to(library.name)
        link.replace(folder / "libcuda.so")
        built.replace(library)
    return folder
