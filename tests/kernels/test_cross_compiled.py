"""C++ that is built on every processor compiles for processors other than x86."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from qlora_compile.kernels.cpu import softmax
from qlora_compile.kernels.cpu.toolchain import BFLOAT16, VECTORISED
from qlora_compile.kernels.formats.cpu import decode, encode

COMPILER = "aarch64-linux-gnu-g++"
FOLDER = Path(softmax.__file__).parent
SOURCES = {
    "codebook, 16 bits": decode._CODEBOOK.replace("TYPE", "uint16_t"),
    "codebook, 32 bits": decode._CODEBOOK.replace("TYPE", "float"),
    "integers, 16 bits": decode._INTEGERS.replace("TYPE", "uint16_t"),
    "integers, 32 bits": decode._INTEGERS.replace("TYPE", "float"),
    "encode": encode._SOURCE,
    "softmax": softmax._SOURCE,
    "thin": VECTORISED
    + BFLOAT16
    + "".join((FOLDER / f"{each}.cpp").read_text() for each in ("vectors", "thin", "thin_kernel")),
}


@pytest.mark.skipif(
    shutil.which(COMPILER) is None,
    reason=f"there is no {COMPILER} (Debian: g++-aarch64-linux-gnu)",
)
@pytest.mark.parametrize("name", SOURCES)
def test_it_compiles_for_aarch64(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cpp"
    source.write_text(SOURCES[name])
    options = ["-std=c++20", "-O1", "-fopenmp", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command = [COMPILER, *options, "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
