"""What is torn in Triton's cache is made again, by our launches and for Inductor's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_compile.kernels.torn_kernels import is_torn
from tests.bench.compiled import run


def launch(cache: Path) -> dict[str, object]:
    """Launch a kernel on the fake device, in a process of its own."""
    done = run("tests.fake_device.launches_found", TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    return {name: value for name, value in json.loads(done.stdout).items() if name != "charged"}


def contents(cache: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's cache after a launch: one kernel, and two libraries of Triton's own."""
    folder = tmp_path_factory.mktemp("triton")
    launch(folder)
    assert {file.suffix for file in contents(folder)} > {".json", ".ptx", ".cubin", ".so"}
    return folder


def test_all_that_is_cut_is_made_again(cache: Path) -> None:
    whole = contents(cache)
    for file, content in whole.items():
        file.write_bytes(content[: len(content) // 2])
    try:
        launch(cache)
        made = contents(cache)
        assert made.keys() == whole.keys()
        for file, content in whole.items():
            if file.suffix != ".so":  # of which the linker writes another each time
                assert made[file] == content, file
    finally:
        for file, content in whole.items():
            file.unlink()
            file.write_bytes(content)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_kernel_cut_or_zero_from_any_byte_on_is_torn(cache: Path, data: st.DataObject) -> None:
    [note] = cache.rglob("__grp__*.json")
    assert not is_torn(note)
    read = [note, *(file for file in note.parent.iterdir() if file.suffix in (".json", ".cubin"))]
    file = data.draw(st.sampled_from(sorted({*read})))
    content = file.read_bytes()
    kept = data.draw(st.integers(0, len(content.rstrip(b"\0")) - 1))
    zeros = data.draw(st.booleans())
    file.write_bytes(content[:kept] + bytes(len(content) - kept) * zeros)
    try:
        # The last entry of a table may lose its end.
        assert is_torn(note) or (file.suffix == ".cubin" and zeros and kept > len(content) - 64)
    finally:
        file.write_bytes(content)
