"""Replacing a folder as a whole: readers find the old one or the new one, never a mixture."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qlora_compile.errors import OutputDirectoryError
from qlora_compile.outputs import check_writable
from qlora_compile.saving_errors import UnfinishedSaveError

_EXCHANGE = 2
_HERE = -100
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

_INSIDE = "choose a folder inside it"
_ELSEWHERE = "free some space, or choose another folder"


@contextmanager
def replaced(folder: Path, stays: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of `folder` once the body has ended.

    Files of `folder` that `stays` accepts are linked into the new folder, unless the body has
    written a file of that name. If the body raises, or writing fails, `folder` is as before, and
    nothing else remains. A process that is killed leaves `folder` as before, with a hidden folder
    beside it.

    Raises:
        OutputDirectoryError: the folder cannot be written, or is a mount point; checked before the
            body runs.
        UnfinishedSaveError: the body, or what follows it, could not write its files.
    """
    target = folder.resolve()
    check_writable(target)
    if os.path.ismount(target):
        raise OutputDirectoryError(
            value=str(folder),
            problem="it is a mount point, which no folder can replace",
            remedy=_INSIDE,
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    check_writable(target.parent)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    aside = fresh.with_name(f"{fresh.name}.old")
    try:
        yield fresh
        for path in target.iterdir() if target.is_dir() else ():
            if stays(path) and not (fresh / path.name).exists():
                _link(path, fresh / path.name)
        _make_durable(fresh)
        fresh.chmod(target.stat().st_mode if target.is_dir() else 0o777 & ~_umask())
        _take_place(fresh, target, aside)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        # A folder of the same file system that is mounted here is known by this error alone.
        remedy = _INSIDE if getattr(error, "errno", None) == errno.EBUSY else _ELSEWHERE
        raise UnfinishedSaveError(value=str(folder), problem=str(error), remedy=remedy) from error
    finally:
        # By now one of them is the old folder, if all went well.
        for folder in (fresh, aside) if target.exists() else (fresh,):
            shutil.rmtree(folder, ignore_errors=True)


def _link(path: Path, to: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, to, symlinks=True, copy_function=_linked_or_copied)
    else:
        _linked_or_copied(path, to)


def _linked_or_copied(path: str | Path, to: str | Path) -> None:
    try:
        os.link(path, to, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(path, to, follow_symlinks=False)


def _make_durable(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(path, name)):
                _sync(Path(path, name))
        _sync(Path(path))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _take_place(fresh: Path, target: Path, aside: Path) -> None:
    """Rename `fresh` to `target`; a folder that was there becomes `fresh` or `aside`."""
    if not target.exists():
        os.rename(fresh, target)
        return
    if _exchanged(fresh, target):
        return
    # Between these two the folder is missing. A process killed here leaves it as `aside`.
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        os.rename(aside, target)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; return False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # not Linux
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number not in _UNSUPPORTED:
        raise OSError(number, os.strerror(number), str(other))
    return False
