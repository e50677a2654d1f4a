"""A process that measures for another: what a candidate does to it costs the session nothing.

`python -m qlora_compile.tuning.worker READ WRITE` with two inherited pipe ends. Only its parent
talks to it, by pickles of its own.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection

import torch

from qlora_compile.tuning.measure import measure


def main(read: int, write: int) -> None:
    """Measures what it is asked to until its parent is gone."""
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
        except Exception:
            # Not a rejection: the parent raises it, with where it came from.
            replies.send(traceback.format_exc())
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
