"""Jobs of several processes, which torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONG = bool(os.environ.get("QLORA_COMPILE_DISTRIBUTED_TESTS"))


def start(processes: int, module: str, *arguments: str) -> None:
    """Run `main(*arguments)` of a module of this folder in several processes; fail if one does."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", f"tests.distributed.{module}", *arguments),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
