"""Downloads, strips and unpacks the packages of `carried`, for Linux on x86-64 and Python 3.12.

`make device-wheels` runs it where there is a network.
"""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.device.carried import CARRIED, PACKAGES

LIMIT = 45_000_000
"""Bytes of all files. What goes to a machine without a network is often limited."""

_GLIBC = (17, 24, 28, 34)
_PLATFORM = [
    *("--python-version", "3.12", "--implementation", "cp"),
    *(part for abi in ("cp312", "abi3", "none") for part in ("--abi", abi)),
    *(part for g in _GLIBC for part in ("--platform", f"manylinux_2_{g}_x86_64")),
    *("--platform", "manylinux2014_x86_64"),
]

UNNEEDED = (
    # bitsandbytes for other versions of CUDA and other makers.
    *("bitsandbytes/libbitsandbytes_cuda1[12]*", "bitsandbytes/libbitsandbytes_cuda132*"),
    *("bitsandbytes/libbitsandbytes_rocm*", "bitsandbytes/libbitsandbytes_xpu*"),
    # Unsloth's web interface and command line.
    *("studio/*", "unsloth_cli/*", "tests/*"),
)


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel, except for files that are not needed."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not any(fnmatch.fnmatch(name, pattern) for pattern in UNNEEDED):
                archive.extract(name, folder)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    shutil.rmtree(CARRIED, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    for group, packages in PACKAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            options = ["--no-deps", "--only-binary=:all:", *_PLATFORM, "--dest", folder]
            subprocess.run([*pip, *options, *packages], check=True)
            for wheel in sorted(Path(folder).glob("*.whl")):
                unpack(wheel, CARRIED / group)
        print(f"{CARRIED.name}/{group}: {size(CARRIED / group) / 1e6:.1f} MB")
    total = size(CARRIED)
    if total > LIMIT:
        shutil.rmtree(CARRIED)
        sys.exit(f"{total / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f}: strip more in {__file__}")
    print(f"{total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
