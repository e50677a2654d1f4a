"""C++ is built once, by whichever thread asks first, and in the background without any noise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch._inductor import config
from torch._inductor.exc import CppCompileError

from qlora_compile.kernels.cpu import background
from qlora_compile.kernels.cpu.once import once


def test_threads_that_ask_at_once_get_one_result() -> None:
    computed: list[int] = []
    asked = threading.Barrier(8)

    @once
    def square(number: int) -> list[int]:
        computed.append(number)
        return [number**2]

    found: list[list[int]] = []

    def ask() -> None:
        asked.wait()
        found.append(square(3))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert computed == [3]
    assert all(each is found[0] for each in found)
    assert square(4) == [16]


def test_what_fails_is_tried_again() -> None:
    outcomes = iter([OSError("full"), 1])

    @once
    def fail_first() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    with pytest.raises(OSError, match="full"):
        fail_first()
    assert fail_first() == fail_first() == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_build_is_called_once_and_in_order(threads: int) -> None:
    called: list[int] = []
    builds: list[Callable[[], object]] = [lambda n=n: called.append(n) for n in range(20)]
    background.start(iter(builds), threads=threads)
    background.finish()
    assert sorted(called) == list(range(20))
    if threads == 1:
        assert called == list(range(20))


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [CppCompileError(["g++"], "no such flag"), OSError("disk full")])
def test_a_compiler_or_disk_that_fails_leaves_the_error_to_the_call(error: Exception) -> None:
    called: list[str] = []

    def fail() -> None:
        raise error

    background.start([fail, lambda: called.append("after")], threads=1)
    background.finish()
    assert called == ["after"]


def test_builds_see_the_settings_of_the_caller() -> None:
    seen: list[Any] = []
    with config.patch({"cpp.simdlen": 256}):
        background.start([lambda: seen.append(config.cpp.simdlen)], threads=1)
    background.finish()
    assert seen == [256]


def test_a_process_that_ends_waits_for_no_further_build(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    ended = threading.Thread()
    monkeypatch.setattr(background.threading, "main_thread", lambda: ended)
    background.start([lambda: called.append(1)], threads=1)
    background.finish()
    assert not called
