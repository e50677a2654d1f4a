"""Output directories: checks that one can be written, and finds what a training has saved there."""

import contextlib
import hashlib
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora_compile.errors import OutputDirectoryError
from qlora_compile.json_text import parsed_json

DIGESTS = "digests.json"
"""The file of a checkpoint that has a digest of each other one."""
LOCK = ".run.lock"
"""The file that says that a run writes in its directory now."""


def check_writable(path: Path) -> None:
    """Check that a directory is writable, or can be created; create nothing.

    Raises:
        OutputDirectoryError: the directory cannot be written.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        problem = "this is a file" if existing == path.absolute() else f"{existing} is a file"
        raise _unwritable(path, problem)
    try:
        # Try an anonymous file: permissions do not show that a file system is read-only or full.
        with tempfile.TemporaryFile(dir=existing):
            return
    except OSError as error:
        problem = f"cannot write in {existing}: {error.strerror or type(error).__name__}"
        raise _unwritable(path, problem) from error


def writable_directory(path: Path) -> Path:
    """Create a directory if it does not exist, check that a file can be written there, return it.

    Raises:
        OutputDirectoryError: the directory cannot be written.
    """
    check_writable(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or type(error).__name__) from error
    return path


def last_checkpoint(directory: Path, up_to: float = math.inf) -> Path | None:
    """Return the Trainer's newest whole checkpoint of a step `up_to` this one, None without one.

    Checkpoints with a missing, cut or changed file are passed over.
    """
    newest_first = (folder for step, folder in reversed(checkpoints(directory)) if step <= up_to)
    return next((folder for folder in newest_first if damage(folder) is None), None)


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return the step and the folder of each of the Trainer's checkpoints, in order of the steps.

    Anything else with a similar name, such as checkpoint-best, is a user's own.
    """
    found = {folder: folder.name.rpartition("-")[2] for folder in directory.glob("checkpoint-*")}
    return sorted((int(n), each) for each, n in found.items() if n.isdecimal() and each.is_dir())


def damage(checkpoint: Path) -> str | None:
    """Return which file of a Trainer's checkpoint is missing, cut or changed, None if it is whole.

    The Trainer writes its state last. Other files of tensors or JSON show whether they are cut.
    Then all are compared with their digests, unless the run was killed before it wrote the digests:
    then the checkpoint of one process is whole, and of several ones, which write a part each, one
    may have written none.
    """
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{state.name} is missing"
    for file in sorted(checkpoint.rglob("*")):
        try:
            whole = not file.is_file() or _IS_WHOLE.get(file.suffix, lambda _: True)(file)
        except _UNREADABLE:
            whole = False
        if not whole:
            return f"{file.relative_to(checkpoint)} is cut"
    noted = checkpoint / DIGESTS
    if not noted.is_file() and (checkpoint / "rng_state_0.pth").is_file():
        return f"{DIGESTS} is missing"
    try:
        digests = dict(parsed_json(noted.read_bytes())) if noted.is_file() else {}
        for name, digest in digests.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if _digest(checkpoint / name) != digest:
                return f"{name} is not what was saved"
    except (OSError, ValueError, TypeError):
        return f"{DIGESTS} is not what was saved"
    return None


def write_digests(checkpoint: Path) -> None:
    """Write a digest of each file of a checkpoint into it. The Trainer may save a checkpoint again:
    at the end of an epoch, say, that is the last step as well.

    Raises:
        OSError: a file cannot be read, or the digests cannot be written.
    """
    others = (file for file in checkpoint.rglob("*") if file != checkpoint / DIGESTS)
    files = sorted(file for file in others if file.is_file())
    digests = {str(file.relative_to(checkpoint)): _digest(file) for file in files}
    write_whole(checkpoint / DIGESTS, json.dumps(digests, indent=2))


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)  # SHA-256 takes four times as long without SHA-NI
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_UNREADABLE += (struct.error,)


def _is_whole_json(file: Path) -> bool:
    return isinstance(parsed_json(file.read_bytes()), dict | list)


def _is_whole_safetensors(file: Path) -> bool:
    """Whether the file is as long as its header says: https://github.com/huggingface/safetensors"""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        header = parsed_json(opened.read(min(size, file.stat().st_size)))
    ends = (each["data_offsets"][1] for name, each in header.items() if name != "__metadata__")
    return file.stat().st_size == 8 + size + max(ends, default=0)


# torch.save writes ZIP archives, whose directory is at the end.
_IS_WHOLE: dict[str, Callable[[Path], bool]] = {
    ".json": _is_whole_json,
    ".safetensors": _is_whole_safetensors,
    **dict.fromkeys((".pt", ".pth", ".bin"), zipfile.is_zipfile),
}


def write_whole(file: Path, text: str) -> None:
    """Write a file so that a reader never sees a part of it, even if this process is killed.

    Raises:
        OSError: the file cannot be written; what was there before is unchanged.
    """
    written = file.with_name(f".{file.name}.tmp")
    try:
        with written.open("w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(written, file)
    finally:
        written.unlink(missing_ok=True)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, if its file system has locks.

    Raises:
        OutputDirectoryError: another run writes there now.
    """
    from filelock import FileLock, Timeout  # the command line imports this file before all else

    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(FileLock(directory / LOCK).acquire(timeout=0))
        except Timeout as error:
            raise OutputDirectoryError(
                value=str(directory),
                problem="another run writes there now",
                remedy="wait for its end, or choose another directory",
            ) from error
        except PermissionError as error:  # the lock of another user's run
            raise _unwritable(directory, f"{LOCK}: {error.strerror}") from error
        except (OSError, NotImplementedError):
            pass  # a file system without locks, as some of clusters are; the run goes on
        yield


def _unwritable(path: Path, problem: str) -> OutputDirectoryError:
    return OutputDirectoryError(
        value=str(path), problem=problem, remedy="choose a directory that can be written"
    )
