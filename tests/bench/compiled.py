"""Prints what the binaries of the toy kernels hold as JSON.

It runs in a separate process, because the tests' process may have its kernels decorated for
Triton's interpreter, and then cannot compile.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` with TRITON_INTERPRET unset unless it is given."""
    inherited = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def records(module: str, *arguments: str, session: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the JSON that the module prints; a failure has its standard error.

    The module runs once per test session, whose processes share the result.
    """
    folder = session.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    kept = folder / f"{'-'.join((module, *arguments))}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            done = run(module, *arguments)
            assert done.returncode == 0, done.stderr
            kept.write_text(done.stdout)
    return json.loads(kept.read_text())


def main() -> None:
    from bench.static.figures import figures
    from tests.bench import toy_kernels as toys

    launches = [
        *((arch, toys.product_launch()) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")),
        ("gfx942", toys.product_launch()),
        *(("sm_80", toys.widen_launch(kernel)) for kernel in (toys.widen, toys.widen_badly)),
        ("sm_80", toys.crowded_launch()),
    ]
    found = [
        {"arch": arch, "kernel": launch.kernel.__name__}
        | dataclasses.asdict(figures(launch, arch, streams=True))
        for arch, launch in launches
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
