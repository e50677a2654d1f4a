"""Keeps between processes what parsing the kernels' sources has found: parsing them all takes most
of a second."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from qlora_compile.json_text import parsed_json
from qlora_compile.tuning.warning import warn_of_folder
from qlora_compile.tuning.whole_files import UNLOCKED, replace_file

Parsed = tuple[str, list[list[str]]]
"""The digest of a source, and the names of the modules that each of its imports may load."""


class ParsedSources:
    """What has been parsed, by a key that follows the source's content.

    The file `sources.json` in `folder` keeps it. The file's first line is a checksum of the second.
    A file that is missing or damaged counts as empty.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "sources.json"
        self._kept = self._read()
        self._used: dict[str, Parsed] = {}
        self._changed = False

    def _read(self) -> dict[str, Parsed]:
        try:
            checksum, text = self._file.read_bytes().split(b"\n")[:2]
            return parsed_json(text) if checksum == _checksum(text) else {}
        except (OSError, ValueError):
            return {}

    def find(self, key: str, parse: Callable[[], Parsed]) -> Parsed:
        """Return what is kept under `key`; without anything, keep what `parse` returns."""
        if key not in self._used:
            self._changed |= key not in self._kept
            self._used[key] = self._kept[key] if key in self._kept else parse()
        return self._used[key]

    def write(self) -> None:
        """Write what this process has used, if the file lacks any of it. If the folder cannot be
        written, this warns, once per process."""
        if not self._changed:
            return
        text = json.dumps(self._used).encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._file, [_checksum(text), text], UNLOCKED)
        except OSError as error:
            warn_of_folder(self._file.parent, error)
        self._changed = False


@functools.cache
def parsed_sources(folder: Path) -> ParsedSources:
    """Return what this process has parsed or found in `folder`."""
    return ParsedSources(folder)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
