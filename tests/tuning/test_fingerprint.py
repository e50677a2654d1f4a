"""Fingerprints: each part follows what it describes, and none is made up."""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile.kernels import registry
from qlora_compile.kernels.variants.dense import Dense
from qlora_compile.kernels.variants.fused import Fused, Skinny
from qlora_compile.kernels.variants.triton_variant import TritonVariant
from qlora_compile.tuning import fingerprint as module
from qlora_compile.tuning import sources as sources_module
from qlora_compile.tuning.errors import FingerprintError
from qlora_compile.tuning.fingerprint import (
    Fingerprint,
    cpu_named,
    established,
    fingerprint,
    fingerprint_or_reason,
    fingerprints_here,
)
from qlora_compile.tuning.parsed_sources import parsed_sources
from qlora_compile.tuning.warning import RecordWarning

CLOUD = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
cpu MHz\t\t: 2595.124
flags\t\t: fpu avx avx2 avx512f smep fma
"""
ARM = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd sve i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd4f
"""


class Outside(Dense):
    """A variant that is defined outside the kernels' folder."""

    name = "outside"


@pytest.fixture(autouse=True)
def _nothing_cached():
    cached = ("_triton_version", "_nvidia_driver", "_amd_driver", "_cpu_name")
    for name in cached:
        getattr(module, name).cache_clear()
    yield
    for name in cached:
        getattr(module, name).cache_clear()


def read_sources_again() -> None:
    """What was read of the sources is forgotten, as in a new process."""
    sources_module.sources_digest.cache_clear()
    sources_module._read.cache_clear()
    parsed_sources.cache_clear()


def found(device: str = "cpu") -> Fingerprint:
    made = fingerprint_or_reason(device)
    assert isinstance(made, Fingerprint), made
    assert made == fingerprint(device) == established(device)
    return made


def reason(device: str = "cpu") -> str:
    made = fingerprint_or_reason(device)
    assert isinstance(made, str), made
    assert fingerprint(device) is None
    with pytest.raises(FingerprintError, match="no measurement on it can be kept"):
        established(device)
    return made


def test_this_cpu_has_one():
    made = found()
    assert [name for name, _ in made.kernels] == [each.name for each in registry.VARIANTS]
    assert all(len(digest) == 64 for _, digest in made.kernels)
    assert made.torch.startswith(torch.__version__)
    assert made.driver == "none"
    assert made in fingerprints_here()


def test_the_thread_count_is_the_present_one():
    before = found()
    torch.set_num_threads(before.threads + 1)
    try:
        after = found()
    finally:
        torch.set_num_threads(before.threads)
    assert after == dataclasses.replace(before, threads=before.threads + 1)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the kernels, which the fingerprint takes for the real ones."""
    folder = tmp_path / "kernels"
    shutil.copytree(Path(str(registry.__file__)).parent, folder)
    moved = ModuleType("registry")
    moved.__dict__.update(__file__=str(folder / "registry.py"), VARIANTS=registry.VARIANTS)
    monkeypatch.setattr(module, "registry", moved)
    monkeypatch.setattr(sources_module, "registry", moved)
    read_sources_again()
    yield folder
    read_sources_again()


def digests() -> dict[str, str]:
    read_sources_again()
    return dict(found().kernels)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


ALL = {each.name for each in registry.VARIANTS}
TRITON = {each.name for each in registry.VARIANTS if isinstance(each, TritonVariant)}
USES = {
    "variants/base.py": ALL,
    "formats/nf4.py": ALL,
    "variants/triton_variant.py": TRITON,
    # Imported inside functions alone.
    "gpu/gemm.py": {"tail", "fused", "skinny"},
    "variants/tail.py": {"tail"},
    "variants/fused.py": {"fused", "skinny"},
    "variants/dense.py": {"dense", "augmented_native"},
    "cpu/thin.cpp": ALL,
    # Nothing that a variant runs.
    "op.py": set(),
    "registry.py": set(),
    "experts/op.py": set(),
}


@pytest.mark.parametrize(("file", "users"), USES.items())
def test_a_source_counts_for_the_variants_that_use_it(sources: Path, file: str, users: set[str]):
    before, path = digests(), sources / file
    with path.open("a") as source:
        source.write("\nNEW = 1\n")
    assert changed(before, digests()) == users


@pytest.mark.parametrize(
    "file", [file for file, users in USES.items() if file.endswith("py") and users]
)
def test_a_source_that_is_missing_is_not_passed_over(sources: Path, file: str):
    (sources / file).unlink()
    assert "source" in reason()


def test_another_process_parses_only_what_has_changed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "cache"))
    parsed: list[ast.AST] = []
    imported = sources_module._imported

    def noted(tree: ast.AST, package: str) -> Iterator[tuple[str, ...]]:
        parsed.append(tree)
        return imported(tree, package)

    monkeypatch.setattr(sources_module, "_imported", noted)
    before = digests()
    assert len(parsed) > len(USES)
    parsed.clear()
    assert digests() == before
    assert not parsed
    (sources / "variants/tail.py").write_text("NEW = 1\n")
    (sources / "problem.py").write_bytes((sources / "problem.py").read_bytes() + b"# a comment\n")
    assert changed(before, digests()) == {"tail"}
    assert len(parsed) == 2


def test_what_sources_were_before_is_not_kept(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "cache"))
    sizes = set()
    for number in range(3):
        (sources / "problem.py").write_text(f"NUMBER = {number}\n")
        digests()
        sizes.add((tmp_path / "cache/sources.json").stat().st_size)
    assert len(sizes) == 1


def test_a_folder_that_cannot_be_written_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = digests()
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path / "cache"))
    with pytest.warns(RecordWarning, match="cache"):
        assert digests() == before


def _with_comment(text: str) -> str:
    return f"# a comment\n{text}\n# another"


def _with_other_docstring(text: str) -> str:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text_before = ast.get_docstring(node) is not None
            node.body[:text_before] = [ast.Expr(ast.Constant("Said otherwise."))]
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.parametrize("rewritten", [_with_comment, _with_other_docstring])
def test_comments_docstrings_and_layout_do_not_count(
    sources: Path, rewritten: Callable[[str], str]
):
    before = digests()
    for path in sources.rglob("*.py"):
        path.write_text(rewritten(path.read_text()))
    assert digests() == before


@given(data=st.data())
def test_every_number_and_name_counts(data: st.DataObject):
    """One of them changed, anywhere in a source."""
    path = Path(str(registry.__file__)).parent / "variants" / "dense.py"
    tree = ast.parse(path.read_text())
    nodes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name)
        or (isinstance(node, ast.Constant) and isinstance(node.value, int | float))
    ]
    before = repr(sources_module._plain(tree))
    node = data.draw(st.sampled_from(nodes))
    if isinstance(node, ast.Name):
        node.id += "_"
    elif isinstance(node.value, int | float):
        node.value += 1
    assert repr(sources_module._plain(tree)) != before
    assert repr(sources_module._plain(ast.parse(ast.unparse(tree)))) != before


def test_what_is_no_python_is_not_trusted(sources: Path):
    (sources / "problem.py").write_text("not ( Python")
    assert "problem.py is not Python" in reason()


def test_without_sources_there_is_none(sources: Path):
    shutil.rmtree(sources)
    assert "has no source file" in reason()


def test_a_variants_source_counts_wherever_it_is(monkeypatch: pytest.MonkeyPatch):
    without = found().kernels
    monkeypatch.setattr(registry, "VARIANTS", (*registry.VARIANTS, Outside()))
    *others, (name, digest) = found().kernels
    assert tuple(others) == without
    assert name == "outside"
    assert digest not in dict(without).values()


def test_variants_of_one_file_have_the_same_sources():
    digest = sources_module.sources_digest
    assert digest(Fused) == digest(Skinny) != digest(Dense)


def test_a_variant_without_source_is_not_trusted(monkeypatch: pytest.MonkeyPatch):
    namespace: dict[str, Any] = {"__name__": "prompt", "Dense": Dense}
    exec("class Typed(Dense): ...", namespace)
    monkeypatch.setattr(registry, "VARIANTS", (*registry.VARIANTS, namespace["Typed"]()))
    assert "class prompt.Typed has no source file" in reason()


def test_other_devices_have_none():
    assert "fingerprints are of cpu and cuda devices" in reason("meta")
    assert "torch knows no such device" in reason("abacus")
    assert f"torch sees {torch.cuda.device_count()} GPUs" in reason("cuda:9999")


def test_a_cpu_is_named_by_all_that_tells_cores_apart():
    name = cpu_named(CLOUD)
    assert name.startswith("vendor_id AuthenticAMD, cpu family 25, model 17, model name AMD EPYC")
    for line, same in (
        ("cpu MHz\t\t: 1400.000\n", True),
        ("stepping\t: 2\n", False),
        ("flags\t\t: fpu avx avx2 smep fma\n", False),
        ("flags\t\t: fpu avx avx2 avx512f fma\n", True),  # smep is not for computing
    ):
        field = line.split("\t")[0]
        lines = [line if old.startswith(f"{field}\t") else f"{old}\n" for old in CLOUD.splitlines()]
        assert (cpu_named("".join(lines)) == name) == same
    assert cpu_named(f"{CLOUD}\n{CLOUD}") == name
    assert "CPU part 0xd4f" in cpu_named(ARM)
    assert cpu_named(ARM).count(";") == 0
    assert cpu_named(f"{ARM}\n{ARM.replace('0xd4f', '0xd40')}").count(";") == 1
    assert cpu_named("processor\t: 0\n") == cpu_named("") == ""


def test_a_cpu_without_name_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    assert "cpuinfo: No such file" in reason()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    assert "the system does not name its CPU" in reason()


def test_a_mac_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert "sysctl does not tell machdep.cpu.brand_string" in reason()


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU, as torch and the NVIDIA driver would tell of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.version, "hip", None)
    version = tmp_path / "version"
    monkeypatch.setattr(module, "NVIDIA_DRIVER", version)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    return version


def test_a_gpu_is_named_with_its_driver(gpu: Path):
    made = found("cuda")
    assert (made.driver, made.device, made.threads) == ("550.54.15", "NVIDIA H100 80GB HBM3", 0)
    module._nvidia_driver.cache_clear()
    gpu.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert found("cuda:0").driver == "535.104.05"
    assert len(fingerprints_here()) == 2


def test_a_gpu_without_driver_or_name_has_none(gpu: Path, monkeypatch: pytest.MonkeyPatch):
    gpu.write_text("something else\n")
    assert "names no driver version" in reason("cuda")
    gpu.unlink()
    assert "cannot read" in reason("cuda")
    gpu.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "")
    assert "is empty" in reason("cuda")

    def lost(device: str) -> str:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(torch.cuda, "get_device_name", lost)
    assert "device lost" in reason("cuda")
    assert fingerprints_here() == {found("cpu")}


def test_amds_driver_is_its_own_or_the_kernels(
    gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(module, "AMD_DRIVER", tmp_path / "amdgpu" / "version")
    assert "no driver version" in reason("cuda")
    (tmp_path / "amdgpu").mkdir()
    monkeypatch.setattr("platform.release", lambda: "6.8.0")
    assert found("cuda").driver == "linux 6.8.0"
    (tmp_path / "amdgpu" / "version").write_text("6.12.12\n")
    module._amd_driver.cache_clear()
    assert found("cuda").driver == "6.12.12"


def test_tritons_version_is_told_by_whichever_package_brings_it(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.6.0"

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", version)
    packages = {"triton": ["triton-windows", "triton-windows"]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: packages)
    assert found().triton == "triton-windows 3.6.0"
    module._triton_version.cache_clear()
    packages.clear()
    assert "no installed package says which version" in reason()
    module._triton_version.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert found().triton == "none"
