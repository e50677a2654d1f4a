"""Processes that use one store: forked from one that has imported torch, which takes seconds.

Commands are lines of the standard input; a child tells what it did in lines of the standard output,
each written by one call, so that lines of several children do not mix.
"""

import os
import sys
import time
from pathlib import Path

from qlora_compile.tuning.caution import TRUSTING
from qlora_compile.tuning.fingerprint import established
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.tuner import Tuner
from tests.tuning.records import (
    real_problem,
    sample_fingerprint,
    sample_problem,
    sample_record,
)

KEYS = 16
TURNS = 3


def say(*words: object) -> None:
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def append_until_killed(folder: Path, start: int) -> None:
    """Say a number once its record is appended; numbers take turns in `KEYS` keys."""
    store = RecordStore(folder)
    number = start
    while True:
        store.append(sample_record(sample_problem(n=number % KEYS + 1), seconds=number))
        say("appended", number)
        number += 1


def append_some(folder: Path, first: int, count: int) -> None:
    store = RecordStore(folder)
    for number in range(first, first + count):
        store.append(sample_record(sample_problem(n=number)))


def take_turns(folder: Path) -> None:
    store = RecordStore(folder)
    for _ in range(TURNS):
        with store.exclusive(sample_problem(), sample_fingerprint(), timeout=60) as mine:
            say("in", os.getpid(), mine)
            time.sleep(0.005)
            say("out", os.getpid(), mine)


def hold(folder: Path) -> None:
    with RecordStore(folder).exclusive(sample_problem(), sample_fingerprint(), timeout=0) as mine:
        say("holds", mine)
        time.sleep(600)


def tune(folder: Path, *sizes: int) -> Tuner:
    """Measure problems of these sizes for real, as briefly as can be."""
    tuner = Tuner(str(folder), RecordStore(folder), budget=60.0, each=0.001)
    tuner.caution = TRUSTING
    tuner.ensure(real_problem(n=size) for size in sizes)
    return tuner


def tune_until_killed(folder: Path, start: int) -> None:
    size = start
    while True:
        tune(folder, size)
        say("tuned", size)
        size += 1


def tune_some(folder: Path, first: int, count: int) -> None:
    say("measured", tune(folder, *range(first, first + count)).measurements)


CHILDREN = {
    "tune_until_killed": lambda folder, start: tune_until_killed(folder, int(start)),
    "tune_some": lambda folder, first, count: tune_some(folder, int(first), int(count)),
    "append_until_killed": lambda folder, start: append_until_killed(folder, int(start)),
    "append_some": lambda folder, first, count: append_some(folder, int(first), int(count)),
    "take_turns": take_turns,
    "hold": hold,
}


def main() -> None:
    """Each command is a number of children and for each its words; says when all are dead."""
    # What every child would read again: the sources of all variants.
    established("cpu")
    say("ready")
    for command in sys.stdin:
        children = []
        for words in command.rstrip("\n").split("\t"):
            name, folder, *rest = words.split(" ")
            child = os.fork()
            if child == 0:
                CHILDREN[name](Path(folder), *rest)
                os._exit(0)
            say("born", child)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        say("dead", *codes)


if __name__ == "__main__":
    main()
