"""IsolatedMeasurement: measures in another process, which a candidate may crash or hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import Choice
from qlora_compile.tuning.errors import CandidateError, TuningProcessError
from qlora_compile.tuning.judgement import Measurement

_WORKER = "qlora_compile.tuning.worker"


class IsolatedMeasurement:
    """One worker process, started on first use and again each time it has died."""

    def __init__(self) -> None:
        self._worker: tuple[subprocess.Popen, Connection, Connection] | None = None

    def measure(
        self, problem: Problem, candidates: Sequence[Choice], seconds: float, limit: float = 120.0
    ) -> Measurement:
        """Measure as `measure.measure` does, in the worker process.

        A candidate is rejected if it kills the process, or does not return within `limit` seconds,
        compiling included. Raises TuningProcessError if the process dies before any candidate ran,
        and CandidateError if a candidate raises an error that is not in `rejected_errors`.
        """
        lost: dict[int, str] = {}
        while True:
            _, requests, replies = self._started()
            running: int | None = None
            state = torch.get_num_threads(), torch.get_float32_matmul_precision()
            try:
                requests.send((*state, problem, tuple(candidates), seconds, tuple(lost)))
                while replies.poll(limit + seconds):
                    reply = replies.recv()
                    if isinstance(reply, Measurement):
                        reply.rejected |= lost
                        return reply
                    if isinstance(reply, str):
                        name = "making operands" if running is None else candidates[running].name
                        raise CandidateError(candidate=name, problem=problem, traceback=reply)
                    running = reply
                reason = f"it did not return within {limit:.0f} s"
                self.close(wait=0.0)
            except (EOFError, BrokenPipeError):
                reason = f"it took its process down ({self.close()})"
            if running is None:
                raise TuningProcessError(problem=reason)
            lost[running] = reason

    def close(self, wait: float = 5.0) -> str:
        """End the process, by force after `wait` seconds; return how it ended."""
        if self._worker is None:
            return "not running"
        process, requests, replies = self._worker
        self._worker = None
        requests.close()
        replies.close()
        try:
            code = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def _started(self) -> tuple[subprocess.Popen, Connection, Connection]:
        if self._worker is None:
            (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
            # So that the worker can import what this process can import.
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            command = [sys.executable, "-m", _WORKER, str(their_read), str(their_write)]
            process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=(their_read, their_write),
                stdin=subprocess.DEVNULL,
            )
            os.close(their_read)
            os.close(their_write)
            ends = Connection(our_write, readable=False), Connection(our_read, writable=False)
            self._worker = process, *ends
        return self._worker
