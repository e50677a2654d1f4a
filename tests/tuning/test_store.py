"""The store: what is appended is found, by everyone, once, and only where it was measured."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from qlora_compile.tuning import contents
from qlora_compile.tuning.cache_folder import cache_folder
from qlora_compile.tuning.errors import RecordFileError
from qlora_compile.tuning.fingerprint import Fingerprint
from qlora_compile.tuning.record import Record, from_line, to_line
from qlora_compile.tuning.store import OWN_FILE, RecordFile, RecordStore
from qlora_compile.tuning.warning import RecordWarning
from tests.tuning.conftest import Writers
from tests.tuning.records import (
    changed_fingerprints,
    sample_fingerprint,
    sample_problem,
    sample_record,
)
from tests.tuning.writer import TURNS

OTHER = sample_fingerprint(device="another CPU")


def write(path: Path, *records: Record) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{to_line(record)}\n" for record in records))
    return path


def lines_of(folder: Path) -> list[Record]:
    return [from_line(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def test_the_folder_is_the_variables_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("QLORA_COMPILE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("QLORA_COMPILE_CACHE")
        else:
            monkeypatch.setenv("QLORA_COMPILE_CACHE", unset)
        assert cache_folder() == platformdirs.user_cache_path("qlora-compile", appauthor=False)


def test_what_is_appended_is_found_by_all(tmp_path: Path):
    folder = tmp_path / "not" / "there"
    stores = [RecordStore(folder), RecordStore(folder)]
    assert stores[1].read() == {}
    assert not folder.exists()
    record = sample_record()
    assert stores[1].find(*record.key) is None
    stores[0].append(record)
    for store in (*stores, RecordStore(folder)):
        assert store.find(*record.key) == record
        assert store.read() == {record.key: record}


def test_ranks_find_one_record(tmp_path: Path):
    record = sample_record(sample_problem(device="cuda"))
    RecordStore(tmp_path).append(record)
    problem = dataclasses.replace(record.problem, device="cuda:3")
    assert RecordStore(tmp_path).find(problem, record.fingerprint) == record


@pytest.mark.parametrize("other", changed_fingerprints().values(), ids=changed_fingerprints())
def test_another_fingerprints_record_is_never_found(other: Fingerprint, tmp_path: Path):
    store = RecordStore(tmp_path)
    store.append(sample_record())
    assert store.find(sample_problem(), other) is None
    assert store.find(sample_problem(), sample_fingerprint()) is not None


@pytest.mark.parametrize("reader", [RecordStore, lambda folder: RecordFile(folder / OWN_FILE)])
def test_a_record_holds_while_the_variants_tried_are_the_same(reader: Any, tmp_path: Path):
    """Whatever becomes of the others; of several that hold, the one measured last counts."""
    here = sample_fingerprint()
    tried = here.of_variants(["dense", "tail"])
    assert [name for name, _ in tried.kernels] == ["dense", "tail"]
    record, later = (
        sample_record(fingerprint=tried, day=2),
        sample_record(fingerprint=here.of_variants(["dense"]), day=3),
    )
    store = RecordStore(tmp_path)
    store.append(record)

    def found(**digests: str) -> Any:
        kernels = tuple((dict(here.kernels) | digests).items())
        there = dataclasses.replace(here, kernels=kernels)
        assert store.prune({here, there}) == 0
        return reader(tmp_path).find(sample_problem(), there)

    assert found() == found(fused="changed") == found(new="one") == record
    assert found(tail="changed") is found(dense="changed") is None
    store.append(later)
    assert found() == found(tail="changed") == later
    assert found(dense="changed") is None
    nothing = sample_record(sample_problem(n=3), dataclasses.replace(here, kernels=()))
    store.append(nothing)
    assert reader(tmp_path).find(nothing.problem, here) is None


def test_a_later_record_takes_the_place_of_an_earlier(tmp_path: Path):
    store = RecordStore(tmp_path)
    kept, old, new = sample_record(sample_problem(n=3)), sample_record(day=2), sample_record(day=1)
    for record in (old, kept, new):
        store.append(record)
    assert store.find(*old.key) == new
    assert lines_of(tmp_path) == [kept, new]


def test_own_records_win_and_else_the_last_file(tmp_path: Path):
    first, second, own = (sample_record(seconds=seconds) for seconds in (1, 2, 3))
    write(tmp_path / "a.jsonl", second, first)
    store = RecordStore(tmp_path)
    assert store.find(*first.key) == first
    write(tmp_path / "z.jsonl", second)
    assert store.find(*first.key) == second
    store.append(own)
    assert store.find(*first.key) == RecordStore(tmp_path).find(*first.key) == own
    write(tmp_path / "below" / "records.jsonl", first)
    write(tmp_path / "records.json", first)
    assert store.find(*first.key) == own
    (tmp_path / "records.jsonl").unlink()
    assert store.find(*first.key) == second


def test_only_changed_files_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    really = contents.read_lines
    monkeypatch.setattr(contents, "read_lines", lambda path: read.append(path.name) or really(path))
    shipped, record = sample_record(sample_problem(n=3)), sample_record()
    write(tmp_path / "shipped.jsonl", shipped)
    store = RecordStore(tmp_path)
    for _ in range(3):
        assert store.find(*shipped.key) == shipped
    assert read == ["shipped.jsonl"]
    RecordStore(tmp_path).append(record)
    assert store.find(*record.key) == record
    assert store.find(*shipped.key) == shipped
    assert read == ["shipped.jsonl", "records.jsonl"]


def test_eight_processes_at_once_lose_none(writers: Writers, tmp_path: Path):
    writers.start(*(f"append_some {tmp_path} {1 + 10 * child} 10" for child in range(8)))
    assert writers.until_dead() == ([], [0] * 8)
    assert sorted(record.problem.n for record in lines_of(tmp_path)) == list(range(1, 81))
    assert len(RecordStore(tmp_path).read()) == 80


def test_threads_at_once_lose_none(tmp_path: Path):
    store = RecordStore(tmp_path)
    records = [sample_record(sample_problem(n=n)) for n in range(1, 17)]
    threads = [threading.Thread(target=store.append, args=(record,)) for record in records]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines_of(tmp_path)) == len(records)


def test_one_of_eight_processes_measures_at_a_time(writers: Writers, tmp_path: Path):
    born = writers.start(*[f"take_turns {tmp_path}"] * 8)
    said, codes = writers.until_dead()
    assert codes == [0] * 8
    assert len(said) == 8 * TURNS * 2
    for entered, left in zip(said[::2], said[1::2], strict=True):
        assert entered == ["in", left[1], "True"]
        assert left == ["out", entered[1], "True"]
    assert {int(words[1]) for words in said} == set(born)


def test_a_key_is_free_again_once_its_holder_is_killed(writers: Writers, tmp_path: Path):
    store, key = RecordStore(tmp_path), (sample_problem(), sample_fingerprint())
    [child] = writers.start(f"hold {tmp_path}")
    writers.expect("holds", "True")
    with store.exclusive(*key, timeout=0) as mine:
        assert not mine
    with store.exclusive(sample_problem(n=3), key[1], timeout=0) as mine:
        assert mine
    subprocess.run(["kill", "-9", str(child)], check=True)
    assert writers.until_dead() == ([], [-9])
    with store.exclusive(*key, timeout=0) as mine:
        assert mine
    with store.exclusive(*key, timeout=0) as mine:
        assert mine


def test_an_error_while_measuring_frees_the_key(tmp_path: Path):
    store, key = RecordStore(tmp_path), (sample_problem(), sample_fingerprint())
    with pytest.raises(PermissionError), store.exclusive(*key, timeout=0):
        raise PermissionError
    with store.exclusive(*key, timeout=0) as mine:
        assert mine


def test_merging_takes_what_is_newer(tmp_path: Path):
    def at(n: int, day: int) -> Record:
        return sample_record(sample_problem(n=n), day=day)

    folder = tmp_path / "store"
    store = RecordStore(folder)
    write(folder / "shipped.jsonl", at(1, 5), at(2, 5))
    store.append(at(3, 5))
    files = [
        write(tmp_path / "a.jsonl", at(1, 4), at(2, 7), at(3, 5), at(4, 1)),
        write(tmp_path / "b.jsonl", at(2, 6), at(4, 2)),
    ]
    assert store.merge(files) == 2
    expected = {record.key: record for record in (at(1, 5), at(2, 7), at(3, 5), at(4, 2))}
    assert store.read() == RecordStore(folder).read() == expected
    assert store.merge(files) == 0
    assert store.merge([]) == 0


def test_merging_a_bad_file_changes_nothing(tmp_path: Path):
    good = write(tmp_path / "good.jsonl", sample_record())
    store = RecordStore(tmp_path / "store")
    with pytest.raises(RecordFileError, match=r"absent.jsonl.*No such file.*; check the path"):
        store.merge([good, tmp_path / "absent.jsonl"])
    assert store.read() == {}
    torn = tmp_path / "torn.jsonl"
    torn.write_text(to_line(sample_record())[:-5])
    with pytest.warns(RecordWarning, match=r"torn.jsonl:1: skipped, .*truncated"):
        assert store.merge([good, torn]) == 1


def test_exports_hold_what_was_asked_for(tmp_path: Path):
    store = RecordStore(tmp_path / "store")
    mine, others = sample_record(), sample_record(fingerprint=OTHER)
    path = tmp_path / "shipped.jsonl"
    with pytest.raises(RecordFileError, match="none to export; tune first"):
        store.export(path, None)
    for record in (mine, others):
        store.append(record)
    assert store.export(path, {mine.fingerprint}) == 1
    assert RecordStore(tmp_path).read() == {mine.key: mine}
    with pytest.raises(RecordFileError, match="the file exists; choose another"):
        store.export(path, None)
    assert store.export(path, None, overwrite=True) == 2
    assert RecordStore(tmp_path).read() == store.read()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["shipped.jsonl"]


def test_exports_that_cannot_be(tmp_path: Path):
    store = RecordStore(tmp_path)
    store.append(sample_record())
    for path, problem in (
        (tmp_path / "absent" / "file.jsonl", "No such file"),
        (tmp_path / "records.jsonl", "this is the store itself"),
    ):
        with pytest.raises(RecordFileError, match=problem):
            store.export(path, None, overwrite=True)
    with pytest.raises(RecordFileError, match="none to export; tune first, or export --all"):
        store.export(tmp_path / "new.jsonl", {OTHER})
    assert len(store.read()) == 1


def test_pruning_keeps_what_fits(tmp_path: Path):
    current = sample_fingerprint()
    kept = [
        sample_record(fingerprint=dataclasses.replace(current, **changed))
        for changed in ({}, {"device": "GPU"}, {"driver": "1"}, {"threads": 9})
    ]
    gone = [
        sample_record(fingerprint=dataclasses.replace(current, **changed))
        for changed in ({"kernels": (("dense", "k"),)}, {"torch": "2.12"}, {"triton": "3"})
    ]
    write(tmp_path / "shipped.jsonl", kept[1], gone[0])
    with (tmp_path / "shipped.jsonl").open("a") as file:
        file.write("no record\n")
    store = RecordStore(tmp_path)
    for record in (kept[0], *kept[2:], *gone[1:]):
        store.append(record)
    with pytest.warns(RecordWarning, match="shipped.jsonl:3: skipped"):
        assert store.prune({current, OTHER}) == 4
    assert store.read() == RecordStore(tmp_path).read() == {record.key: record for record in kept}
    assert (tmp_path / "shipped.jsonl").read_text() == f"{to_line(kept[1])}\n"
    assert store.prune({current}) == 0


def test_the_store_needs_no_triton_and_no_gpu():
    code = "import sys, torch, qlora_compile.tuning.store as _; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
