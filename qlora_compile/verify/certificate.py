"""Certificate: how exactly one rewritten graph computed what the captured one does, by which
kernels and versions; and the JSON line it is kept as."""

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

VERSION = 2
_VERSION_KEY = "qlora_compile_certificate"


@dataclass(frozen=True)
class Comparison:
    """One output or gradient of a region or of a fused call in it, on `inputs`: "real", "random",
    "random, dropped out" or "random, in float32".

    Errors are Euclidean norms of the difference from the reference, over the reference's: `error`
    of the rewritten graph, `plain_error` of the captured one in the same dtypes; `allowed` is what
    `error` may be.
    """

    inputs: str
    tensor: str
    error: float
    plain_error: float
    allowed: float

    @property
    def ratio(self) -> float | None:
        """`error` over `plain_error`; 1 where both are zero, None where the plain alone is."""
        if self.plain_error:
            return self.error / self.plain_error
        return None if self.error else 1.0

    @property
    def passes(self) -> bool:
        return self.error <= self.allowed  # false for NaN


@dataclass(frozen=True)
class Versions:
    """What a certificate holds for: device, kernels' sources, torch, Triton and driver are in
    `fingerprint`; `sources` is a digest of all of qlora_compile's."""

    fingerprint: Fingerprint
    transformers: str
    peft: str
    sources: str


Key = tuple[str, tuple[str, ...], Versions]


@dataclass(frozen=True)
class Certificate:
    """A rewritten graph that passed; `comparisons` holds every output and gradient.

    pattern: digest of the graph, as in `graph_pattern`. region: the class of the block. kernels:
    the implementations chosen, with their directions. reference: the dtype of the evaluation that
    errors are from, and why it is not float64 where it is not. factor: how many times the plain
    error was allowed a whole region.
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

    @property
    def worst(self) -> Comparison:
        """The comparison with the largest ratio; of those without one, the largest error."""
        return _worst(self.comparisons)

    def worst_on(self, inputs: str) -> Comparison:
        """The same of one of `inputs`."""
        return _worst(c for c in self.comparisons if c.inputs == inputs)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The kinds of inputs it was checked on."""
        return tuple(dict.fromkeys(comparison.inputs for comparison in self.comparisons))

    @property
    def key(self) -> Key | None:
        """None where the versions could not be established: such a one is not kept."""
        return self.versions and (self.pattern, self.kernels, self.versions)

    def to_dict(self) -> dict[str, Any]:
        """All of it, with the ratios."""
        comparisons = [asdict(each) | {"ratio": each.ratio} for each in self.comparisons]
        return asdict(self) | {"comparisons": comparisons}

    def __str__(self) -> str:
        """Such as "Block verified: worst ratio 1.03 (gradient of q_proj.lora_A, random); on real
        and random inputs"."""
        worst, last = self.worst, self.inputs[-1]
        ratio = "unknown" if worst.ratio is None else f"{worst.ratio:.2f}"
        inputs = f"{'; '.join(self.inputs[:-1])} and {last}" if len(self.inputs) > 1 else last
        return (
            f"{self.region} verified: worst ratio {ratio} ({worst.tensor}, {worst.inputs}); "
            f"on {inputs} inputs"
        )


def _worst(comparisons: Iterable[Comparison]) -> Comparison:
    return max(comparisons, key=lambda c: (c.ratio or 0.0, c.error))


def to_line(certificate: Certificate) -> str:
    """A certificate as one line of JSON, ASCII, without the newline."""
    return written_line(certificate, _VERSION_KEY, VERSION)


def from_line(line: str) -> Certificate:
    """The certificate of a line. Raises RecordLineError where `to_line` did not make it."""
    return read_line(Certificate, line, _VERSION_KEY, VERSION)


def versions_here(device: str) -> Versions | None:
    """Those that run here, None where one cannot be established."""
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
    # Not rglob, which does not enter `kernels` and `passes` where they are links.
    files = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            files += _source_files(path)
        elif path.suffix in (".py", ".cpp"):
            files.append(path)
    return files
