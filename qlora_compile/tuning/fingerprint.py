"""Fingerprint: everything but the problem that decides whether a measured choice is still valid.

Nothing is guessed: if a part cannot be established there is no fingerprint, and then no measurement
is stored or looked up.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from qlora_compile.kernels import registry
from qlora_compile.kernels.cpu import instructions
from qlora_compile.kernels.cpu.instructions import CPUINFO
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.tuning.errors import FingerprintError
from qlora_compile.tuning.parsed_sources import parsed_sources
from qlora_compile.tuning.sources import UnestablishedError, sources_digest

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
AMD_DRIVER = Path("/sys/module/amdgpu/version")

# x86 and ARM identify a core by different lines. In some clouds the model name is just "AMD EPYC".
_CORE_LINES = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "stepping",
    "CPU implementer",
    "CPU architecture",
    "CPU variant",
    "CPU part",
    "CPU revision",
)
# Only vector and bit instructions: a new Linux release may list other flags without a new speed.
_ISA_FLAG = re.compile(
    r"s?sse|avx|fma|f16c|amx|bmi|abm|popcnt|vaes|gfni|sve|sme(?!p)|neon|asimd|fphp|bf16|i8mm|fcma"
)


@dataclass(frozen=True)
class Fingerprint:
    """The device, the software versions and the kernels' sources of a measurement.

    kernels: (name, digest of the sources it uses) of each variant; in a record, of the variants
    that were tried. triton, driver: "none" where there is none. threads: torch's thread count on a
    CPU, 0 on a GPU.
    """

    kernels: tuple[tuple[str, str], ...]
    torch: str
    triton: str
    driver: str
    device: str
    threads: int

    def of_variants(self, names: Collection[str]) -> Fingerprint:
        """Return the same fingerprint with only the variants named."""
        return replace(self, kernels=tuple(each for each in self.kernels if each[0] in names))

    def covers(self, other: Fingerprint) -> bool:
        """Whether measurements made under `other` are valid under this fingerprint.

        The variants that were tried must have the same sources here, and all else must be equal;
        other variants do not matter.
        """
        return replace(other, kernels=self.kernels) == self and self.has_sources_of(other)

    def has_sources_of(self, other: Fingerprint) -> bool:
        """Whether torch, Triton and the sources of the variants of `other` are the same here."""
        versions = (self.torch, self.triton) == (other.torch, other.triton)
        return versions and bool(other.kernels) and set(other.kernels) <= set(self.kernels)


def fingerprint(device: str) -> Fingerprint | None:
    """Return the fingerprint of a torch device as it is now; None if it cannot be established."""
    result = fingerprint_or_reason(device)
    return None if isinstance(result, str) else result


def fingerprint_or_reason(device: str) -> Fingerprint | str:
    """Return the fingerprint of a torch device as it is now, or why there is none."""
    try:
        return established(device)
    except FingerprintError as error:
        return str(error)


def fingerprints_here() -> set[Fingerprint]:
    """Return the fingerprints of those devices of this machine that have one."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {found for found in map(fingerprint, devices) if found is not None}


def established(device: str) -> Fingerprint:
    """Return the fingerprint of a torch device as it is now.

    Raises:
        FingerprintError: a part of the fingerprint cannot be established.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise FingerprintError(device=device, problem="torch knows no such device") from error
    try:
        if kind == "cpu":
            name, driver, threads = _cpu_name(CPUINFO), "none", torch.get_num_threads()
        elif kind == "cuda":
            name, driver, threads = _gpu_name(device), _gpu_driver(), 0
        else:
            raise UnestablishedError("fingerprints are of cpu and cuda devices")
        found = Fingerprint(
            kernels=tuple((each.name, sources_digest(type(each))) for each in registry.VARIANTS),
            torch=_torch_version(),
            triton=_triton_version(),
            driver=driver,
            device=name,
            threads=threads,
        )
        parsed_sources(cache_folder()).write()
    except UnestablishedError as error:
        raise FingerprintError(device=device, problem=str(error)) from error
    if "" in astuple(found):
        raise FingerprintError(device=device, problem=f"a part of {found} is empty")
    return found


def _torch_version() -> str:
    """Return torch's version and build, and its precision setting for float32 products."""
    built = f"cuda={torch.version.cuda} hip={torch.version.hip}"
    return f"{torch.__version__} {built} float32={torch.get_float32_matmul_precision()}"


@functools.cache
def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "none"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Builds for ROCm and Windows are in packages of other names. This search takes 0.3 s.
        packages = sorted(set(importlib.metadata.packages_distributions().get("triton", ())))
    if not packages:
        raise UnestablishedError("triton is there, and no installed package says which version")
    return " ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _gpu_name(device: str) -> str:
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise UnestablishedError(f"torch sees {torch.cuda.device_count()} GPUs")
    try:
        return torch.cuda.get_device_name(device)
    except RuntimeError as error:
        raise UnestablishedError(f"the driver does not answer: {error}") from error


def _gpu_driver() -> str:
    # torch only reports the driver's API level, which many drivers share.
    return _amd_driver(AMD_DRIVER) if torch.version.hip else _nvidia_driver(NVIDIA_DRIVER)


@functools.cache
def _nvidia_driver(path: Path) -> str:
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+[\d.]*)\s", _text(path), re.MULTILINE)
    if found is None:
        raise UnestablishedError(f"{path} names no driver version")
    return found[1]


@functools.cache
def _amd_driver(path: Path) -> str:
    if path.exists():
        return _text(path).strip()
    # The driver that is part of Linux has no version of its own.
    if path.parent.exists() and platform.release():
        return f"linux {platform.release()}"
    raise UnestablishedError(f"there is no {path.parent}, and so no driver version")


@functools.cache
def _cpu_name(cpuinfo: Path) -> str:
    system = platform.system()
    if system == "Linux":
        name = cpu_named(_text(cpuinfo))
    elif system == "Darwin":
        name = _sysctl("machdep.cpu.brand_string")
    else:
        name = platform.processor()
    if not name:
        raise UnestablishedError("the system does not name its CPU")
    # With the vector instructions that torch's kernels use, and ours; ATEN_CPU_CAPABILITY and
    # QLORA_COMPILE_CPU can restrict them.
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {instructions.level()}"


def cpu_named(cpuinfo: str) -> str:
    """Return a CPU's name from the text of /proc/cpuinfo, "" if the text says too little.

    The name holds the lines that distinguish cores, once for each kind of core in the machine, and
    a digest of the vector instructions.
    """
    cores: set[str] = set()
    flags: set[str] = set()
    for processor in cpuinfo.split("\n\n"):
        lines = dict(
            (name.strip(), value.strip())
            for name, _, value in (line.partition(":") for line in processor.splitlines())
        )
        identity = [f"{name} {lines[name]}" for name in _CORE_LINES if lines.get(name)]
        if lines.get("model name") or lines.get("CPU part"):
            cores.add(", ".join(identity))
        flags.update((lines.get("flags") or lines.get("Features") or "").split())
    if not cores:
        return ""
    isa = " ".join(sorted(flag for flag in flags if _ISA_FLAG.match(flag)))
    return f"{'; '.join(sorted(cores))}, isa {hashlib.sha256(isa.encode()).hexdigest()[:12]}"


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(
            ["sysctl", "-n", name], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise UnestablishedError(f"sysctl does not tell {name}: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UnestablishedError(f"cannot read {path}: {error.strerror}") from error
