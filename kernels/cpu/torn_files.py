"""Removes unfinished files from Inductor's cache folder, such as a power cut leaves.

Inductor makes a file where there is none, and loads what is there. Part of a library raises an
OSError at every start or ends the process by SIGBUS, part of a Python module raises some error or
computes something else. Entries of its caches, which it unpickles, it makes anew itself.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path

_HEADER = struct.Struct("<4sBB10x2HI3QI6H")
"""Of an ELF file: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html"""


@functools.cache
def remove_torn_files() -> None:
    """Remove torn libraries and modules, once in a process, so that Inductor makes them again."""
    from torch._inductor.codecache import get_lock_dir
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    folder = Path(cache_dir())
    for library in folder.glob("*/*.so"):
        if is_whole_library(library):
            continue
        # Inductor holds this lock while the library is built.
        with FileLock(os.path.join(get_lock_dir(), f"{library.name.partition('.')[0]}.lock")):
            if not is_whole_library(library):
                library.unlink(missing_ok=True)
    for module in folder.glob("*/*.py"):
        if not is_whole_module(module):
            module.unlink(missing_ok=True)


def is_whole_library(library: Path) -> bool:
    """Return whether an ELF file, little-endian of 64 bits, has its table of sections, which
    linkers write last. Another file is taken for whole unless it is short or begins with zeros."""
    try:
        with library.open("rb") as opened:
            head = opened.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return False
            magic, bits, order, *_ = fields = _HEADER.unpack(head)
            if magic != b"\x7fELF":
                return any(head[4:])
            if bits == 1 or order == 2:
                return True
            place, size, count = fields[8], fields[13], fields[14]
            opened.seek(place)
            table = opened.read(size * count)
    except FileNotFoundError:  # removed meanwhile
        return True
    return 0 < size * count == len(table) and any(table[-size:])


def is_whole_module(module: Path) -> bool:
    """Return whether a module's name is the digest of its content, as Inductor names them."""
    from torch._inductor.codecache import get_hash

    try:
        return get_hash(module.read_text().strip(), "", "code") == module.stem
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
