"""Every example runs; those for several processes run in one."""

import os
import runpy
import socket
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.docs.test_blocks import filled, workplace
from tests.test_equality import as_rewritten

__all__ = ["as_rewritten", "filled", "workplace"]

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {
    "experts.py": ["my-mixture"],
    "hf_trainer.py": ["my-model", "text.jsonl"],
    "one_object.py": ["my-model", "chat.jsonl"],
    "trl_sft.py": ["my-model", "chat.jsonl"],
}
SEVERAL_PROCESSES = ("ddp.py", "fsdp2.py")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.usefixtures("workplace", "as_rewritten")
def test_an_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.name, ["my-model"])])
    if path.name in SEVERAL_PROCESSES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in job.items():
            monkeypatch.setitem(os.environ, name, str(value))
    runpy.run_path(str(path), run_name="__main__")


def test_the_list_of_examples_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in listed for path in EXAMPLES)
