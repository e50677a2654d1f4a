"""Building C++ in other threads, before it is needed."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterable, Iterator

_NAME = "builds"


def start(builds: Iterable[Callable[[], object]], *, threads: int) -> None:
    """Have `builds` called in other threads, in order. Each is a call that builds a C++ function
    and keeps it, so that a later call waits for this build or does not build at all. What a build
    raises because of the compiler or the disk is left to the later call to raise."""
    waiting, lock = iter(builds), threading.Lock()
    for _ in range(threads):
        # Settings of Inductor, such as its compiler, are the caller's.
        work = contextvars.copy_context().run
        threading.Thread(target=work, args=(_work, waiting, lock), name=_NAME).start()


def finish() -> None:
    """Wait until everything that was started is built, as for a measurement."""
    for thread in threading.enumerate():
        if thread.name == _NAME:
            thread.join()


def _work(waiting: Iterator[Callable[[], object]], lock: threading.Lock) -> None:
    from torch._inductor.exc import CppCompileError

    # The process ends only when its threads have, and then nobody needs the rest.
    while threading.main_thread().is_alive():
        with lock:
            build = next(waiting, None)
        if build is None:
            return
        with contextlib.suppress(CppCompileError, OSError):
            build()
