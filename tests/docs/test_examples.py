"""Every example runs, those for several processes in one; Slurm's gives torchrun options that
torchrun has."""

import os
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.distributed.jobs import obstacle
from tests.docs.blocks import ROOT
from tests.docs.ray_stand_in import use_stand_in
from tests.docs.test_blocks import filled, parse, workplace
from tests.test_equality import as_rewritten

__all__ = ["as_rewritten", "filled", "workplace"]

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARGUMENTS = {
    "experts.py": ["my-mixture"],
    "hf_trainer.py": ["my-model", "text.jsonl"],
    "one_object.py": ["my-model", "chat.jsonl"],
    "trl_sft.py": ["my-model", "chat.jsonl"],
    "with_ray.py": ["my-model", "1"],
}
SEVERAL_PROCESSES = ("ddp.py", "fsdp2.py", "with_ray.py")
SBATCH = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
    *("requeue", "output", "partition", "account", "mem", "signal"),
}
"""Options of sbatch: https://slurm.schedmd.com/sbatch.html"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
@pytest.mark.usefixtures("workplace", "as_rewritten")
def test_an_example_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name == "fsdp2.py" and (reason := obstacle("fsdp2")):
        pytest.skip(reason)
    monkeypatch.setattr(sys, "argv", [str(path), *ARGUMENTS.get(path.name, ["my-model"])])
    if path.name in SEVERAL_PROCESSES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in job.items():
            monkeypatch.setitem(os.environ, name, str(value))
    use_stand_in(monkeypatch)
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("started_again", [False, True])
def test_slurm_starts_what_exists(started_again: bool, tmp_path: Path) -> None:
    """Stand-ins of Slurm's commands show what torchrun is given on each machine."""
    script = ROOT / "examples" / "slurm.sh"
    stand_ins = {
        # More than a pipe holds: a reader that stops after the first host would end the script.
        "scontrol": "printf 'one\\n'; seq 100000",
        "srun": '"$@"',
        "torchrun": f"printf '%s\\n' \"$@\" > {tmp_path}/given",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    if started_again:
        (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").touch()
    job = {"JOB_NODELIST": "[one-two]", "NNODES": "2", "GPUS_ON_NODE": "4", "JOB_ID": "7"}
    slurm = {f"SLURM_{name}": value for name, value in job.items()}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(script), "my model", "text.jsonl", f"{tmp_path}/run"]
    subprocess.run(command, env=os.environ | slurm | path, check=True)
    given = get_args_parser().parse_args((tmp_path / "given").read_text().splitlines())
    assert (given.nnodes, given.nproc_per_node, given.rdzv_id) == ("2", "4", "7")
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", "one:29500")
    assert (given.no_python, given.training_script) == (True, "qlora-compile")
    parse(given.training_script_args)
    expected = ["train", "--model", "my model", "--data", "text.jsonl", "--output"]
    resumed = ["--resume"] * started_again
    assert given.training_script_args == [*expected, f"{tmp_path}/run", *resumed]


def test_slurms_options_are_sbatchs_and_one_torchrun_starts_on_a_machine() -> None:
    lines = (ROOT / "examples" / "slurm.sh").read_text(encoding="utf-8").splitlines()
    options = [shlex.split(line)[1] for line in lines if line.startswith("#SBATCH ")]
    assert {option.removeprefix("--").partition("=")[0] for option in options} <= SBATCH
    assert "--ntasks-per-node=1" in options


def test_the_list_of_examples_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({path.name})" in listed for path in EXAMPLES)
    assert "(slurm.sh)" in listed
