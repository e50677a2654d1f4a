"""Keeps between processes what parsing the kernels' sources has found: parsing them all takes most
of a second."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from qlora_compile.json_text import parsed_json
from qlora_compile.tuning.warning import warn_of_folder
from qlora_compile.tuning.whole_files import replace_file

_FILE = "sources.json"


class ParsedSources:
    """The digest of each source and the names that it imports, by a key that follows its content.

    They are kept in a file in `folder`, whose first line is a checksum of the second. A file that
    is missing or damaged counts as empty.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / _FILE
        self.found = self._read()
        self._kept = len(self.found)

    def _read(self) -> dict[str, tuple[str, list[list[str]]]]:
        try:
            checksum, text = self._file.read_bytes().split(b"\n")[:2]
            return parsed_json(text) if checksum == _checksum(text) else {}
        except (OSError, ValueError):
            return {}

    def write(self) -> None:
        """Write what has been added. If the folder cannot be written, this warns, once per
        process."""
        if len(self.found) == self._kept:
            return
        text = json.dumps(self.found).encode()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._file, [_checksum(text), text], "writing-")
        except OSError as error:
            warn_of_folder(self._file.parent, error)
        self._kept = len(self.found)


@functools.cache
def parsed_sources(folder: Path) -> ParsedSources:
    """Return this process's sources parsed for `folder`."""
    return ParsedSources(folder)


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
