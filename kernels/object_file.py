"""Tells whole files of machine code from unfinished ones, such as a power cut leaves."""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER = struct.Struct("<4sBB10x2HI3QI6H")
"""Of an ELF file: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html"""


def is_whole_object(file: Path) -> bool:
    """Return whether an ELF file, little-endian of 64 bits, has the later of its two tables, which
    is written last: that of sections in a library, of segments in a kernel of NVIDIA's.

    Another file is taken for whole unless it is short or begins with zeros.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return False
            magic, bits, order, *_ = fields = _HEADER.unpack(head)
            if magic != b"\x7fELF":
                return any(head[4:])
            if bits == 1 or order == 2:
                return True
            segments = (fields[7], fields[11], fields[12])
            sections = (fields[8], fields[13], fields[14])
            place, size, count = max(segments, sections)
            opened.seek(place)
            table = opened.read(size * count)
    except FileNotFoundError:  # removed meanwhile
        return True
    return 0 < size * count == len(table) and any(table[-size:])
