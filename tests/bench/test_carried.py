"""What is carried to a machine that has a GPU and no network."""

from __future__ import annotations

import zipfile
from pathlib import Path

from bench.device import carried, wheels


def test_what_is_not_needed_is_not_carried(tmp_path: Path) -> None:
    wheel = tmp_path / "some-1-py3-none-any.whl"
    kept = ["bitsandbytes/libbitsandbytes_cuda130.so", "unsloth/models/llama.py", "trl/a.py"]
    left = ["bitsandbytes/libbitsandbytes_cuda128.so", "bitsandbytes/libbitsandbytes_rocm70.so"]
    left += ["studio/frontend/a.js", "unsloth_cli/a.py"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in kept + left:
            archive.writestr(name, name)
    wheels.unpack(wheel, tmp_path / "out")
    found = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(map(str, found)) == sorted(kept)
    assert wheels.size(tmp_path / "out") == sum(map(len, kept))


def test_every_carried_package_has_one_version() -> None:
    for group, packages in carried.PACKAGES.items():
        for package in packages:
            assert package.count("==") == 1, (group, package)
