"""Kernels that were built elsewhere, found wherever their folder now lies."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton import knobs
from triton.runtime.cache import FileCacheManager

from qlora_compile.kernels.gpu.built_cache import MANIFEST, BuiltCache, builder, use_built_cache
from qlora_compile.kernels.gpu.whole_cache import WholeCache

GROUP = "kernel.json"
FILES = {GROUP: b"{}", "kernel.cubin": bytes(range(64))}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """Triton's cache folder; its settings are put back."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path / "now")
        knobs.cache.manager_class = None
        yield tmp_path / "now"


@pytest.fixture
def moved(folder: Path) -> BuiltCache:
    """A kernel's files, written where `folder` lay before."""
    before = folder.with_name("before")
    knobs.cache.dir = str(before)
    written = FileCacheManager("KEY")
    written.put_group(GROUP, {name: written.put(data, name) for name, data in FILES.items()})
    before.rename(folder)
    knobs.cache.dir = str(folder)
    return BuiltCache("KEY")


def test_a_moved_kernel_is_found(moved: BuiltCache, folder: Path) -> None:
    # Triton finds none of its files: 3.6 says so by an empty dict, later ones by None.
    assert not FileCacheManager("KEY").get_group(GROUP)
    assert moved.get_group(GROUP) == {name: str(folder / "KEY" / name) for name in FILES}


def test_files_that_lie_elsewhere_do_not_count(moved: BuiltCache, folder: Path) -> None:
    elsewhere = folder.with_name("before") / "KEY"
    elsewhere.mkdir(parents=True)
    for name, data in FILES.items():
        (elsewhere / name).write_bytes(data)
    group = moved.get_group(GROUP)
    assert group is not None
    assert {Path(path).parent for path in group.values()} == {folder / "KEY"}


@pytest.mark.parametrize("name", FILES)
def test_a_kernel_with_a_file_missing_is_unknown(
    moved: BuiltCache, folder: Path, name: str
) -> None:
    (folder / "KEY" / name).unlink()
    assert moved.get_group(GROUP) is None


def test_a_kernel_whose_note_is_cut_off_is_unknown(moved: BuiltCache, folder: Path) -> None:
    (folder / "KEY" / f"__grp__{GROUP}").write_text('{"child_pa')
    assert moved.get_group(GROUP) is None


def test_an_unknown_kernel_is_unknown(moved: BuiltCache) -> None:
    assert BuiltCache("OTHER").get_group(GROUP) is None


def write_manifest(folder: Path, **changed: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps({"builder": {**builder(), **changed}}))


def test_a_built_folder_is_used_without_a_word(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifest(folder)
    use_built_cache()
    assert knobs.cache.manager_class is BuiltCache
    assert not caplog.records


def test_another_builder_is_told_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_manifest(folder, Triton="another")
    with caplog.at_level(logging.WARNING):
        use_built_cache()
    assert f"the kernels in {folder} were built with another Triton, so that" in caplog.text


def test_in_any_other_folder_what_is_torn_is_passed_over(folder: Path) -> None:
    folder.mkdir()
    use_built_cache()
    assert knobs.cache.manager_class is WholeCache


def test_another_cache_manager_stays(folder: Path) -> None:
    write_manifest(folder)
    knobs.cache.manager_class = FileCacheManager
    use_built_cache()
    assert knobs.cache.manager_class is FileCacheManager


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"builder": {}}', '{"builder": 1}'])
def test_a_damaged_manifest_is_left_alone_with_a_word(
    folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / MANIFEST).write_text(text)
    with caplog.at_level(logging.WARNING):
        use_built_cache()
    assert knobs.cache.manager_class is WholeCache
    assert "cannot be read" in caplog.text
