"""What is torn in Inductor's cache is made again; what another torch or processor built stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor import codecache, config

from qlora_compile.kernels.cpu import instructions, toolchain
from qlora_compile.kernels.cpu.torn_files import is_whole_module, remove_torn_files
from qlora_compile.kernels.object_file import is_whole_object

pytestmark = pytest.mark.skipif(not toolchain.has_compiler(), reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Inductor's cache folder, one for all of these tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(made))
    # Spare the libraries by which Inductor tries the processor's instructions.
    with config.patch({"cpp.vec_isa_ok": True}):
        yield made


def build(value: float = 3) -> Any:
    codecache.CppPythonBindingsCodeCache.cache.clear()
    source = f'extern "C" void kernel(double* out) {{ *out = {value}; }}'
    return toolchain._built(source, ("double*",))


def result(kernel: Any) -> float:
    out = torch.zeros(1, dtype=torch.float64)
    kernel(out)
    return out.item()


@pytest.fixture
def library() -> Path:
    kernel = build()
    assert result(kernel) == 3
    return Path(kernel.__self__.__file__)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_library_cut_or_zero_from_any_byte_on_is_torn(
    library: Path, tmp_path: Path, data: st.DataObject
) -> None:
    assert is_whole_object(library)
    content = library.read_bytes()
    kept = data.draw(st.integers(0, len(content.rstrip(b"\0")) - 1))
    zeros = data.draw(st.booleans())
    (tmp_path / "torn").write_bytes(content[:kept] + bytes(len(content) - kept) * zeros)
    assert not is_whole_object(tmp_path / "torn") or (zeros and kept > len(content) - 64)


def test_a_torn_library_is_built_again(library: Path, folder: Path) -> None:
    """Beside the lock of a process that was killed while it built."""
    key = library.name.partition(".")[0]
    assert (folder / "locks" / f"{key}.lock").exists()
    content = library.read_bytes()
    library.unlink()  # this process has it mapped
    library.write_bytes(content[:4096])
    remove_torn_files.__wrapped__()
    assert not library.exists()
    assert result(build()) == 3
    assert is_whole_object(library)


def test_whole_libraries_and_files_of_others_stay(library: Path, folder: Path) -> None:
    other = folder / "ab" / "script.so"
    other.parent.mkdir(exist_ok=True)
    other.write_text("INPUT(libc.so.6) " * 10)
    _, module = codecache.PyCodeCache.write("call = print\n")
    remove_torn_files.__wrapped__()
    assert all(Path(each).exists() for each in (library, other, module))


@pytest.mark.parametrize("torn", [b"", b"call = prin", b"\0" * 13, b"\xff"])
def test_a_torn_module_is_written_again(torn: bytes) -> None:
    _, module = codecache.PyCodeCache.write("call = print\n")
    Path(module).write_bytes(torn)
    assert not is_whole_module(Path(module))
    remove_torn_files.__wrapped__()
    assert codecache.PyCodeCache.load("call = print\n").call is print


@pytest.mark.usefixtures("library")
def test_another_torch_builds_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {*folder.glob("*/*.so")}
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert result(build()) == 3
    assert len({*folder.glob("*/*.so")} - before) == 1


ONE = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model name	: Intel(R) Xeon(R)
cpu MHz		: 2000.0
flags		: fpu avx2 avx512f

"""
MACHINES = {
    "equal": (ONE, True),
    "more of the same": (ONE + ONE.replace("processor	: 0", "processor	: 1"), True),
    "another clock": (ONE.replace("2000.0", "2596.124"), True),
    "fewer instructions": (ONE.replace(" avx512f", ""), False),
    "another name": (ONE.replace("Xeon(R)", "Xeon(R) 6"), False),
    "ARM": ("processor	: 0\nFeatures	: asimd sve\nCPU part	: 0xd4f\n\n", False),
    "no Linux": (None, False),
}


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", MACHINES)
def test_another_processor_builds_anew(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(cpuinfo: str | None) -> set[Path]:
        path = tmp_path / "cpuinfo"
        path.unlink(missing_ok=True)
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(instructions, "CPUINFO", path)
        instructions.processor.cache_clear()
        assert result(build()) == 3
        return {*folder.glob("*/*.so")}

    shutil.rmtree(folder)
    cpuinfo, same = MACHINES[name]
    try:
        before = on(ONE)
        assert len(on(cpuinfo) - before) == (0 if same else 1)
    finally:
        instructions.processor.cache_clear()
