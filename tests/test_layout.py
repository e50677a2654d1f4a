"""The layout by which the folder `kernels` is not taken for Hugging Face's package `kernels`."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import qlora_compile

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "passes")


@pytest.mark.parametrize("folder", LINKED)
def test_linked_folder_is_no_package_of_its_own(folder):
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("folder", LINKED)
def test_link_points_to_the_folder(folder):
    link = ROOT / "qlora_compile" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..", folder)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_links_are_committed_as_links():
    links = [f"qlora_compile/{folder}" for folder in LINKED]
    staged = subprocess.run(
        ["git", "ls-files", "--stage", *links], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert [line.split()[0] for line in staged.splitlines()] == ["120000"] * len(LINKED)


@pytest.mark.skipif(
    any(found.name == "kernels" for found in importlib.metadata.distributions()),
    reason="Hugging Face's package kernels is installed",
)
def test_transformers_sees_no_kernels_package():
    code = "from transformers.utils import is_kernels_available as seen; assert not seen()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[list[str], list[str]]:
    """The files of the package, and those in a wheel built from a copy (no old build/ leaks in)."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("qlora_compile", *LINKED):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=skip)
    files = [
        Path(folder, name).relative_to(source).as_posix()
        for folder, _, names in os.walk(source / "qlora_compile", followlinks=True)
        for name in names
    ]
    target = tmp_path_factory.mktemp("wheel")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", target]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip_wheel, *offline, source], check=True)
    (wheel,) = target.glob("*.whl")
    return files, zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_every_file_once_and_nothing_else(built):
    files, in_wheel = built
    assert sorted(name for name in in_wheel if ".dist-info/" not in name) == sorted(files)


def test_version_is_the_same_in_the_package_and_its_metadata(built):
    _, in_wheel = built
    assert f"qlora_compile-{qlora_compile.__version__}.dist-info/METADATA" in in_wheel
