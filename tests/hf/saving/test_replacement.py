"""A folder is replaced as a whole, whatever interrupts it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qlora_compile.errors import OutputDirectoryError
from qlora_compile.hf.saving import replacement
from qlora_compile.hf.saving.replacement import replaced
from qlora_compile.saving_errors import UnfinishedSaveError

OLD = {"config.json": "old", "weights": "old", "notes.txt": "mine", "runs/log": "kept"}
NEW = {"config.json": "new", "weights": "new", "notes.txt": "mine", "runs/log": "kept"}
STEPS = ("fsync", "rename", "link", "chmod")


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def replace(folder: Path) -> None:
    with replaced(folder, lambda path: path.name != "weights") as fresh:
        write(fresh, {"config.json": "new", "weights": "new"})


@pytest.fixture(params=["exchanged", "renamed"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "renamed":
        monkeypatch.setattr(replacement, "_exchanged", lambda one, other: False)
    write(tmp_path / "model", OLD)
    return tmp_path / "model"


def test_other_files_stay_and_nothing_is_left(folder: Path) -> None:
    replace(folder)
    assert content(folder) == NEW
    assert os.listdir(folder.parent) == ["model"]
    replace(folder.parent / "runs" / "another")
    assert content(folder.parent / "runs" / "another") == {"config.json": "new", "weights": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")])
def test_interrupted_anywhere_it_is_the_old_or_the_new(
    folder: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = 0
    while (last := last + 1) < 100:
        done = 0

        def interrupted(real, *args, last=last, **kwargs):
            nonlocal done
            done += 1
            if done == last:
                raise error
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            for name in STEPS:
                real = getattr(os, name)
                patched.setattr(os, name, lambda *a, _real=real, **k: interrupted(_real, *a, **k))
            try:
                replace(folder)
            except (KeyboardInterrupt, UnfinishedSaveError):
                pass
            else:
                if done < last:
                    break
        assert content(folder) in (OLD, NEW), last
        assert os.listdir(folder.parent) == ["model"], last
        write(folder, OLD)
    assert last > len(NEW)


def test_what_the_body_raises_leaves_the_old(folder: Path) -> None:
    def fail() -> None:
        with replaced(folder, lambda path: True) as fresh:
            write(fresh, {"weights": "new"})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert content(folder) == OLD
    assert os.listdir(folder.parent) == ["model"]


def test_a_mount_point_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)
    refused = pytest.raises(OutputDirectoryError, match=r"mount point.*choose a folder inside it")
    with refused, replaced(folder, lambda path: True):
        raise AssertionError("the body has begun")
    assert content(folder) == OLD
    assert os.listdir(folder.parent) == ["model"]


def test_a_folder_mounted_from_the_same_file_system_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*args: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(replacement, "_take_place", busy)
    with pytest.raises(UnfinishedSaveError, match="unchanged; choose a folder inside it"):
        replace(folder)
    assert content(folder) == OLD
    assert os.listdir(folder.parent) == ["model"]


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputDirectoryError, match="is a file"):
        replace(tmp_path / "file")
