"""Jobs of several processes, which torchrun starts."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path

from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from tests.waiting import job

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
"""PYTHONPATH of a process that imports what this one does."""
LONG = bool(os.environ.get("QLORA_COMPILE_DISTRIBUTED_TESTS"))


def start(processes: int, module: str, *arguments: str) -> None:
    """Run `main(*arguments)` of a module of this folder in several processes; fail if one does."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), "-m", f"tests.distributed.{module}", *arguments),
    ]
    with job(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": PATHS}) as started:
        said = started.wait()
    assert started.process.returncode == 0, said[-9000:]


def obstacle(engine: str) -> str | None:
    """Return why an engine cannot train here, None if it can."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed; `make test-distributed` installs it"
    if engine in ("fsdp2", "accelerate"):
        source = inspect.getsource(FSDPParam._init_sharded_param)
        if "requires_grad=param.requires_grad" not in source:
            return "this torch has every parameter train that FSDP2 shards, and integers cannot"
    return None
