"""Removes unfinished files from Inductor's cache folder, such as a power cut leaves.

Inductor makes a file where there is none, and loads what is there. Part of a library raises an
OSError at every start or ends the process by SIGBUS, part of a Python module raises some error or
computes something else. Triton, which it starts in processes of its own, is no better with the
kernels in that folder. Entries of its caches, which it unpickles, it makes anew itself.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from qlora_compile.kernels.object_file import is_whole_object
from qlora_compile.kernels.torn_kernels import is_torn


@functools.cache
def remove_torn_files() -> None:
    """Remove what is torn, once in a process, so that it is made again."""
    from torch._inductor.codecache import get_lock_dir
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils._filelock import FileLock

    folder = Path(cache_dir())
    for library in folder.glob("*/*.so"):
        if is_whole_object(library):
            continue
        # Inductor holds this lock while the library is built.
        with FileLock(os.path.join(get_lock_dir(), f"{library.name.partition('.')[0]}.lock")):
            if not is_whole_object(library):
                library.unlink(missing_ok=True)
    for module in folder.glob("*/*.py"):
        if not is_whole_module(module):
            module.unlink(missing_ok=True)
    for note in folder.glob("triton/*/*/__grp__*"):
        if is_torn(note):
            note.unlink(missing_ok=True)


def is_whole_module(module: Path) -> bool:
    """Return whether a module's name is the digest of its content, as Inductor names them."""
    from torch._inductor.codecache import get_hash

    try:
        return get_hash(module.read_text().strip(), "", "code") == module.stem
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
