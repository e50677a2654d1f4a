"""Worker: a process that measures for another, so that a crash costs the user's session nothing.

It is started as `python -m qlora_compile.tuning.worker READ WRITE`, with two inherited pipe ends.
Only the parent writes to the pipe, so the pickles that are read come from the same program.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection

import torch

from qlora_compile.tuning.measure import measure, rejected_errors


def main(read: int, write: int) -> None:
    """Measure what the parent asks for, until the parent is gone."""
    requests, replies = Connection(read, writable=False), Connection(write, readable=False)
    while True:
        try:
            threads, precision, problem, candidates, seconds, skipped = requests.recv()
        except EOFError:
            return
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        try:
            replies.send(measure(problem, candidates, seconds, replies.send, skipped))
        except rejected_errors():
            # `measure` lets one out where it stays with the device and would fail all later
            # candidates, or where a candidate was right at first. The parent knows which one ran.
            sys.exit(1)
        except Exception:
            # An error that rejects no candidate: the parent raises it, with this traceback.
            replies.send(traceback.format_exc())
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
