"""Faults of files: killed writers, damaged lines, folders that cannot be used."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from qlora_compile.tuning import store as module
from qlora_compile.tuning.errors import RecordFileError
from qlora_compile.tuning.record import from_line, to_line
from qlora_compile.tuning.store import RecordStore
from qlora_compile.tuning.warning import RecordWarning
from tests.tuning.conftest import Writers
from tests.tuning.records import sample_fingerprint, sample_problem, sample_record
from tests.tuning.writer import KEYS

KILLS = 50
LINE = to_line(sample_record()).encode()


def told(act: Callable[[], Any]) -> list[str]:
    """Return what an act warns of, all of it the store's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert all(issubclass(warning.category, RecordWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def test_killed_writers_tear_no_line_and_lose_no_record(writers: Writers, tmp_path: Path):
    rng = random.Random(0)
    kept: dict[int, int] = {}
    start = 1
    for _ in range(KILLS):
        [child] = writers.start(f"append_until_killed {tmp_path} {start}")
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        said, codes = writers.until_dead()
        assert codes == [-signal.SIGKILL]
        reported = [int(number) for word, number in said if word == "appended"]
        assert reported == list(range(start, start + len(reported)))
        kept.update({number % KEYS + 1: number for number in reported})
        found = {
            key[0].n: int(record.winner.seconds)
            for key, record in RecordStore(tmp_path).read().items()
        }
        # The next may be there too, appended by one that was killed before it said so.
        start += len(reported)
        if start in found.values():
            kept[start % KEYS + 1] = start
            start += 1
        assert found == kept
    assert kept
    for line in (tmp_path / "records.jsonl").read_text().splitlines():
        from_line(line)
    RecordStore(tmp_path).append(sample_record())
    assert {path.name for path in tmp_path.iterdir()} == {"records.jsonl", "records.lock"}


def test_a_dead_writers_temporary_is_removed_by_the_next(tmp_path: Path):
    (tmp_path / "writing-1-abc.tmp").write_bytes(LINE[:50])
    (tmp_path / "exporting-1-abc.tmp").write_bytes(LINE[:50])
    RecordStore(tmp_path).append(sample_record())
    assert not (tmp_path / "writing-1-abc.tmp").exists()
    assert (tmp_path / "exporting-1-abc.tmp").exists()


def test_a_line_cut_anywhere_is_skipped_with_one_warning(tmp_path: Path):
    other = sample_record(sample_problem(n=3))
    path = tmp_path / "records.jsonl"
    for end in range(1, len(LINE)):
        path.write_bytes(LINE[:end] + b"\n" + to_line(other).encode())
        store = RecordStore(tmp_path)
        assert len(told(store.read)) == 1
        assert store.read() == {other.key: other}
    assert told(RecordStore(tmp_path).read) == []


def test_a_line_with_another_byte_is_skipped(tmp_path: Path):
    rng = random.Random(0)
    other = sample_record(sample_problem(n=3))
    path = tmp_path / "records.jsonl"
    for place in range(len(LINE)):
        flipped = bytearray(LINE)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped + b"\n" + to_line(other).encode())
        store = RecordStore(tmp_path)
        message = told(store.read)
        assert message
        assert f"{path}:" in message[0]
        assert store.read() == {other.key: other}


def test_a_warning_names_file_line_and_reason_once(tmp_path: Path):
    path = tmp_path / "shipped.jsonl"
    foreign = b'{"text": "a document"}'
    newer = LINE.replace(b'"qlora_compile_record":3', b'"qlora_compile_record":4')
    path.write_bytes(b"\n".join((b"", LINE, foreign, newer, LINE[:60], b"\xff\xfe", b"")))
    messages = told(RecordStore(tmp_path).read)
    assert [message.removeprefix(f"{path}:").split(":")[0] for message in messages] == list("3456")
    for message, reason in zip(
        messages, ("something else", "of version 4", "truncated", "not JSON"), strict=True
    ):
        assert reason in message
        assert "records prune" in message
    path.write_bytes(b"\n".join((foreign, LINE)))
    assert told(RecordStore(tmp_path).read) == []


@pytest.mark.filterwarnings("ignore::qlora_compile.tuning.warning.RecordWarning")
def test_lines_that_cannot_be_read_are_kept(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    newer = LINE.replace(b'"qlora_compile_record":3', b'"qlora_compile_record":4')
    strange = [newer, b"\xff\xfe\r", LINE[:-9]]
    path.write_bytes(b"\n".join(strange))
    store = RecordStore(tmp_path)
    records = [sample_record(sample_problem(n=n)) for n in (1, 2)]
    for record in records:
        store.append(record)
    store.merge([])
    assert path.read_bytes().split(b"\n")[:3] == strange
    assert list(store.read().values()) == records
    assert store.prune({sample_fingerprint()}) == 3
    assert list(store.read().values()) == records


def failing(number: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def assert_goes_on(store: RecordStore, reason: str) -> None:
    """Nothing can be written; all is said once, and this store finds what it was given."""
    records = [sample_record(sample_problem(n=n)) for n in (1, 2)]

    def use() -> None:
        for record in records:
            store.append(record)
            assert store.find(*record.key) == record
        assert len(store.read()) == 2
        RecordStore(store.folder).append(records[0])

    messages = told(use)
    assert len(messages) == 1
    assert f"{store.folder}: {reason}" in messages[0]
    assert "QLORA_COMPILE_CACHE" in messages[0]
    assert told(use) == []
    assert RecordStore(store.folder).read() == {}


@pytest.mark.parametrize("below", ["", "store", "deep/store"])
def test_a_folder_that_is_no_folder_warns_once(below: str, tmp_path: Path):
    file, another = tmp_path / "file", tmp_path / "another"
    for path in (file, another):
        path.write_text("not a folder")
    store = RecordStore(file / below)
    assert_goes_on(store, "Not a directory" if below else "File exists")

    def measure() -> None:
        with RecordStore(another / below).exclusive(*sample_record().key, timeout=0) as mine:
            assert mine

    assert len(told(measure)) == 1
    assert told(measure) == []
    for act in (lambda: store.merge([]), lambda: store.prune(set())):
        with pytest.raises(RecordFileError, match="set QLORA_COMPILE_CACHE to another"):
            act()
    assert file.read_text() == "not a folder"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_full_folder_warns_once(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = RecordStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, call, failing(number))
        assert_goes_on(store, os.strerror(number))
        with pytest.raises(RecordFileError, match=os.strerror(number)):
            store.export(tmp_path / "out.jsonl", None)
    assert {path.name for path in tmp_path.iterdir()} == {"records.lock"}
    # There is room again: what was kept in memory is written with the next.
    store.append(sample_record(sample_problem(n=3)))
    assert sorted(key[0].n for key in RecordStore(tmp_path).read()) == [1, 2, 3]


def test_a_full_folder_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new = sample_record(day=1), sample_record(day=2)
    store = RecordStore(tmp_path)
    store.append(old)
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    assert len(told(lambda: store.append(new))) == 1
    assert store.find(*new.key) == new
    assert RecordStore(tmp_path).find(*new.key) == old


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), filelock.Timeout("a.lock")])
def test_a_folder_without_locks_warns_once(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(module.FileLock, "acquire", refuse)
    assert_goes_on(RecordStore(tmp_path), str(error))


def test_a_lock_that_is_never_free_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(tmp_path / "records.lock"):
        assert_goes_on(RecordStore(tmp_path), "The file lock")


def test_a_file_that_cannot_be_read_warns_once_and_hides_no_other(tmp_path: Path):
    record = sample_record()
    RecordStore(tmp_path).append(record)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    store = RecordStore(tmp_path)
    messages = told(store.read)
    assert [Path(message.split(": skipped")[0]).name for message in messages] == [
        "loop.jsonl",
        "folder.jsonl",
    ]
    assert store.read() == {record.key: record}
    assert told(RecordStore(tmp_path).read) == []
