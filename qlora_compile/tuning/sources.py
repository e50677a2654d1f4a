"""Digest of the sources that one variant uses; measurements are valid for one digest.

Python counts by its syntax tree, so that a changed comment, docstring or layout of the text
discards no measurement. C++ counts byte by byte. A source that cannot be read, or an import that
cannot be followed, is an error.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
from abc import ABC
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_compile.kernels import registry
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.tuning.parsed_sources import Parsed, parsed_sources

_KERNELS = "qlora_compile.kernels"

_OWN_SOURCE = Path(__file__).read_bytes()
"""Part of each key of what has been parsed: other code may find something else."""


class UnestablishedError(Exception):
    """A part of a fingerprint cannot be established; the message says why.

    The caller turns this into a FingerprintError, which names the device.
    """


@functools.cache
def sources_digest(variant: type) -> str:
    """Return the digest for a variant's class.

    It covers the modules of the class and of its bases, all modules of the kernels that these
    import, directly or not, and the C++ files in the folders of those.

    Raises:
        UnestablishedError: a source file is missing, or is not Python.
    """
    bases = [each for each in variant.__mro__ if each not in (object, ABC)]
    unread = {each.__module__: _source_of(each) for each in bases}
    digests: dict[str, str] = {}
    while unread:
        module, path = unread.popitem()
        digests[module], imported = _read(module, path)
        unread |= {name: path for name, path in imported.items() if name not in digests}
        if _is_ours(module):
            for native in path.parent.glob("*.cpp"):
                digests[native.name] = hashlib.sha256(_content(native)).hexdigest()
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def _is_ours(module: str) -> bool:
    return module == _KERNELS or module.startswith(f"{_KERNELS}.")


def _path(module: str) -> Path | None:
    """Return the file of a module of the kernels; None if there is no module of this name."""
    folder = Path(str(registry.__file__)).resolve().parent
    place = folder.joinpath(*module.removeprefix(_KERNELS).split(".")[1:])
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _source_of(cls: type) -> Path:
    try:
        found = _path(cls.__module__) if _is_ours(cls.__module__) else inspect.getsourcefile(cls)
    except (TypeError, OSError):  # a class that was typed into a prompt or is in a compiled module
        found = None
    if found is None:
        raise UnestablishedError(f"class {cls.__module__}.{cls.__qualname__} has no source file")
    return Path(found).resolve()


@functools.cache
def _read(module: str, path: Path) -> tuple[str, dict[str, Path]]:
    """Return a digest of one file, and the files of the kernels' modules that it imports."""
    is_package = path.name == "__init__.py"
    package = module if is_package else module.rpartition(".")[0]
    content = _content(path)
    key = hashlib.sha256(b"\n".join((_OWN_SOURCE, package.encode(), content))).hexdigest()
    known = parsed_sources(cache_folder())
    digest, imports = known.find(key, lambda: _parsed(path, package, content))
    imported: dict[str, Path] = {}
    for names in imports:
        files = {name: found for name in names if (found := _path(name))}
        if not files:
            raise UnestablishedError(f"{path} imports {names[0]}, whose source is not there")
        imported |= files
    return digest, imported


def _parsed(path: Path, package: str, content: bytes) -> Parsed:
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        raise UnestablishedError(f"{path} is not Python: {error}") from error
    names = (list(filter(_is_ours, each)) for each in _imported(tree, package))
    digest = hashlib.sha256(repr(_plain(tree)).encode()).hexdigest()
    return digest, [each for each in names if each]


def _imported(tree: ast.AST, package: str) -> Iterator[tuple[str, ...]]:
    """Yield the modules that each import may load: for `from a import b` a, and perhaps a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name,) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                module = importlib.util.resolve_name("." * node.level + module, package)
            yield from ((module, f"{module}.{alias.name}") for alias in node.names)


def _plain(node: Any) -> Any:
    """Return a syntax tree as tuples and lists, without positions, docstrings and absent fields.

    Absent fields differ between versions of Python.
    """
    if isinstance(node, list):
        return [_plain(each) for each in node if not _is_text(each)]
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node)]
    return type(node).__name__, [each for each in fields if each[1] is not None and each[1] != []]


def _is_text(node: Any) -> bool:
    """Whether `node` is a docstring, or a string that describes the name before it."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnestablishedError(f"cannot read {path}: {error.strerror}") from error
