"""Certificate: the errors of one rewritten graph that passed its check, with the kernels and
versions that computed it, and the JSON line that stores it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import qlora_compile
from qlora_compile.tuning.fingerprint import Fingerprint, fingerprint
from qlora_compile.tuning.record import read_line, written_line

VERSION = 3
_VERSION_KEY = "qlora_compile_certificate"


@dataclass(frozen=True)
class Comparison:
    """The errors of one output or gradient of a region, or of a fused call in the region.

    inputs: "real", "random", "random, dropped out" or "random, in float32" for the rewritten
    graph; for the code that was compiled of it these followed by ", compiled". An error is the
    Euclidean norm of the difference from the reference, divided by the norm of the reference:
    `error` of the rewritten graph or its code, `plain_error` of the captured graph in the same
    dtypes. allowed: the largest `error` that passes.
    """

    inputs: str
    tensor: str
    error: float
    plain_error: float
    allowed: float

    @property
    def ratio(self) -> float | None:
        """`error` over `plain_error`; 1 if both are zero, None if only `plain_error` is."""
        if self.plain_error:
            return self.error / self.plain_error
        return None if self.error else 1.0

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed  # false for NaN


@dataclass(frozen=True)
class Versions:
    """The versions that a certificate is valid for.

    fingerprint: device, sources of the kernels, torch, Triton and driver. sources: a digest of all
    sources of qlora_compile.
    """

    fingerprint: Fingerprint
    transformers: str
    peft: str
    sources: str


Key = tuple[str, tuple[str, ...], Versions]


@dataclass(frozen=True)
class Certificate:
    """A rewritten graph that passed; `comparisons` holds every output and gradient.

    pattern: digest of the graph, as in `graph_pattern`. region: the class of the block. kernels:
    the chosen variants, each with its direction. versions: None if they cannot be
    established. reference: the dtype of the evaluation that errors are measured against, and the
    reason if that is not float64. factor: how many times the plain error a whole region was
    allowed. uncompared: why the compiled code was not compared, None if it was.
    """

    pattern: str
    region: str
    kernels: tuple[str, ...]
    versions: Versions | None
    device: str
    dtype: str
    reference: str
    factor: float
    comparisons: tuple[Comparison, ...]
    uncompared: str | None = None

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest ratio; without any ratio, with the largest error."""
        return _worst(self.comparisons)

    def worst_on(self, inputs: str) -> Comparison:
        """Return the worst comparison on one kind of `inputs`."""
        return _worst(c for c in self.comparisons if c.inputs == inputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The kinds of inputs that the graph was checked on."""
        return tuple(dict.fromkeys(comparison.inputs for comparison in self.comparisons))

    @property
    def key(self) -> Key | None:
        """The key in a store; None, for a certificate not to be stored, without versions."""
        return self.versions and (self.pattern, self.kernels, self.versions)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the ratio of every comparison."""
        comparisons = [asdict(each) | {"ratio": each.ratio} for each in self.comparisons]
        return asdict(self) | {"comparisons": comparisons}

    def __str__(self) -> str:
        """For example: "Block verified: worst ratio 1.03 (gradient of q_proj.lora_A, random); on
        real and random inputs"."""
        worst, last = self.worst, self.inputs[-1]
        ratio = "unknown" if worst.ratio is None else f"{worst.ratio:.2f}"
        inputs = f"{'; '.join(self.inputs[:-1])} and {last}" if len(self.inputs) > 1 else last
        without = f"; without its compiled code: {self.uncompared}" if self.uncompared else ""
        return (
            f"{self.region} verified: worst ratio {ratio} ({worst.tensor}, {worst.inputs}); "
            f"on {inputs} inputs{without}"
        )


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda c: (c.ratio or 0.0, c.error))


def to_line(certificate: Certificate) -> str:
    """Return the certificate as one line of JSON, ASCII, without the newline."""
    return written_line(certificate, _VERSION_KEY, VERSION)


def from_line(line: str) -> Certificate:
    """Parse a line. Raises RecordLineError unless `to_line` made the line."""
    return read_line(Certificate, line, _VERSION_KEY, VERSION)


def versions_here(device: str) -> Versions | None:
    """Return the versions that run here, None if one of them cannot be established."""
    found, sources = fingerprint(device), _sources_digest()
    if found is None or sources is None:
        return None
    return Versions(found, _version("transformers"), _version("peft"), sources)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _sources_digest() -> str | None:
    folder = Path(str(qlora_compile.__file__)).parent
    digest = hashlib.sha256()
    try:
        for path in sorted(_source_files(folder)):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    except OSError:
        return None
    return digest.hexdigest()


def _source_files(folder: Path) -> list[Path]:
    # Not rglob: where `kernels` and `passes` are links, it does not enter them.
    files = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            files += _source_files(path)
        elif path.suffix in (".py", ".cpp"):
            files.append(path)
    return files
