"""Training in several processes: starts them, as torchrun does, and says how they ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import typer

from qlora_compile.outputs import last_checkpoint
from qlora_compile.training.settings import RunSettings, write_settings
from qlora_compile.training_errors import LostProcessError

_ENDS_BY = (signal.SIGINT, signal.SIGTERM)
_AT_ONCE = 20  # seconds
_LINES = 30  # of what a process wrote last
_TRAIN = ("-m", "qlora_compile.cli.app", "train")


def is_one_of_several() -> bool:
    """Whether torchrun, or `start_processes`, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_by_signal() -> None:
    """Let Ctrl-C and SIGTERM end this process at once; the process that started it says so."""
    for each in _ENDS_BY:
        signal.signal(each, signal.SIG_DFL)


def start_processes(settings: RunSettings, *, resume: bool, overwrite: bool) -> NoReturn:
    """Train in `settings.processes` processes and exit with their status; report a failure once.

    The first process writes to the terminal and into the output directory. If a process fails, or
    this one gets Ctrl-C or SIGTERM, all are ended.

    Raises:
        typer.Exit: always, with the exit status.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from qlora_compile.tuning.load import usable_cpus

    count = settings.processes
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(usable_cpus()) // count)))
    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as folder:
        file = Path(folder) / "run.yaml"
        write_settings(settings, file)
        arguments = [*_TRAIN, "--config", str(file)]
        arguments += ["--resume"] * resume + ["--overwrite"] * overwrite
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id="qlora-compile",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.5,
            logs_specs=DefaultLogsSpecs(folder, {rank: Std.ALL for rank in range(1, count)}),
        )
        # Failures are reported below, in one message.
        logging.disable(logging.CRITICAL)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except SignalException as error:
            typer.echo(f"stopped: {what_is_saved(Path(settings.output))}", err=True)
            raise typer.Exit(128 + error.sigval) from error
        except ChildFailedError as error:
            rank, failure = _first_failure(error.failures)
            if (recorded := _recorded(failure)) is not None:
                _, message = recorded
                status = 2
            else:
                _show_last_lines(Path(folder), failure.local_rank)
                saved = what_is_saved(Path(settings.output))
                message, status = f"{_end(failure.exitcode)}; {saved}", 1
            typer.echo(f"error: rank {rank} (process {failure.pid}): {message}", err=True)
            raise typer.Exit(status) from error
        finally:
            logging.disable(logging.NOTSET)
    raise typer.Exit


def record_error(error: Exception) -> None:
    """Hand an error to the process that started this one, which shows it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def _recorded(failure: Any) -> tuple[str, str] | None:
    """Return the name of the error's class and the message that `record_error` wrote, if it did."""
    if not isinstance(failure.message, dict):
        return None
    name, _, message = str(dict(failure.message)["message"]).partition(": ")
    return name, message


def _first_failure(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Return the rank and torchrun's note of the process whose end is the cause of the others'.

    Others may end at once, as they lose the connection, and torchrun ends the rest by SIGTERM, or
    by SIGKILL half a minute later.
    """
    first = min(each.timestamp for each in failures.values())

    def order(item: tuple[int, Any]) -> tuple[int, int]:
        each = item[1]
        if each.exitcode == -signal.SIGTERM or each.timestamp - first > _AT_ONCE:
            return 3, each.timestamp
        if each.exitcode < 0:
            return 0, each.timestamp
        name, _ = _recorded(each) or ("", "")
        return 2 if name == LostProcessError.__name__ else 1, each.timestamp

    return min(failures.items(), key=order)


def _show_last_lines(folder: Path, rank: int) -> None:
    """Print the last lines that a rank wrote to stderr; rank 0 writes to the terminal itself."""
    for written in folder.rglob(f"{rank}/stderr.log"):
        lines = written.read_text(encoding="utf-8", errors="replace").splitlines()
        typer.echo("\n".join(lines[-_LINES:]), err=True)


def _end(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}, and the others were ended"
    return f"ended with status {status}, and the others were ended"


def what_is_saved(output: Path) -> str:
    """Say what a training that has ended early leaves in `output`."""
    saved = last_checkpoint(output)
    if saved is None:
        return "nothing was saved"
    return f"{saved} holds adapter and training state; --resume goes on from there"
