"""The process that compares: one JSON line per model type, in the order of its arguments."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import warnings
from dataclasses import asdict

MEMORY = 12 << 30
"""Bytes of address space, so that a model which wants more fails alone, not the machine."""


def main(arguments: list[str]) -> None:
    inductor = "--inductor" in arguments
    names = [name for name in arguments if name != "--inductor"]
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Whatever models print must not come between the rows.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    import torch

    from bench.coverage.compare import compared
    from bench.coverage.kinds import KINDS

    torch.set_num_threads(1)
    for name in names:
        row = compared(KINDS[name], inductor=inductor)
        print(json.dumps(asdict(row)), file=results, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
