"""Every source of data, from the command line and from Python: the same rows, trained on right.

docs/data.md has the table of sources and entry points; each of its cells is a case here.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from qlora_compile.data_errors import DataSourceError, SplitNameError
from qlora_compile.errors import DatasetTypeError, EmptyDatasetError
from qlora_compile.hf.trainer.sources import READERS, read
from qlora_compile.hf.training import FineTuning
from qlora_compile.training.run import TrainingRun
from qlora_compile.training.settings import RunSettings
from tests.examples import LONG
from tests.hf.trainer.chats import ROWS, of_trl, small_model
from tests.toy_language_model import chat_tokenizer

TEXTS, CHATS = ROWS["text"], ROWS["messages"]
NAMED = [
    {
        "messages": [
            {**turn, **({"name": "n"} if n else {})} for n, turn in enumerate(row["messages"])
        ]
    }
    for row in CHATS[2:]
]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        yield


def lines(rows: list[Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def packed(path: Path) -> Path:
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    path.unlink()
    return Path(f"{path}.gz")


def jsonl(folder: Path, rows: list[Any] = CHATS, name: str = "a.jsonl") -> Path:
    (folder / name).write_text(lines(rows))
    return folder / name


def json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(CHATS))
    return folder / "a.json"


def table(folder: Path, ending: str, **options: Any) -> Path:
    pd.DataFrame(TEXTS).to_csv(folder / f"a{ending}", index=False, **options)
    return folder / f"a{ending}"


def parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(CHATS).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def paragraphs(folder: Path, ending: str) -> Path:
    (folder / f"a{ending}").write_text("\n\n".join(row["text"] for row in TEXTS))
    return folder / f"a{ending}"


def several(folder: Path) -> list[Path]:
    return [jsonl(folder, CHATS[:2]), jsonl(folder, CHATS[2:], "b.jsonl")]


def folder_of_files(folder: Path) -> Path:
    several(folder)
    return folder


def saved(folder: Path) -> Path:
    datasets.Dataset.from_list(CHATS).save_to_disk(folder / "saved")
    return folder / "saved"


def splits_of(**splits: datasets.Dataset) -> datasets.DatasetDict:
    made = datasets.DatasetDict()
    made.update(splits)
    return made


def saved_splits(folder: Path) -> Path:
    whole = datasets.Dataset.from_list(CHATS)
    splits_of(train=whole, test=whole.select(range(2))).save_to_disk(folder / "saved")
    return folder / "saved"


FILES: dict[str, tuple[Callable[[Path], Any], list[Any]]] = {
    ".jsonl": (jsonl, CHATS),
    ".json": (json_list, CHATS),
    ".csv": (lambda folder: table(folder, ".csv"), TEXTS),
    ".tsv": (lambda folder: table(folder, ".tsv", sep="\t"), TEXTS),
    ".parquet": (parquet, CHATS),
    ".txt": (lambda folder: paragraphs(folder, ".txt"), TEXTS),
    ".md": (lambda folder: paragraphs(folder, ".md"), TEXTS),
}
SOURCES = {
    **FILES,
    **{
        f"{ending}.gz": (lambda folder, make=make: packed(make(folder)), rows)
        for ending, (make, rows) in FILES.items()
    },
    "several files": (several, CHATS),
    "folder of files": (folder_of_files, CHATS),
    "saved dataset": (saved, CHATS),
    "saved splits": (saved_splits, CHATS),
    "files whose turns have other parts": (
        lambda folder: [jsonl(folder, CHATS[:2]), jsonl(folder, NAMED, "b.jsonl")],
        CHATS,
    ),
    "Hub name": (lambda folder: "someone/chats", CHATS),
}
"""What names the data on the command line and in Python, and the rows it holds."""


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(CHATS)

    def __getitem__(self, place: int) -> Any:
        return CHATS[place]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(CHATS)


def whole() -> datasets.Dataset:
    return datasets.Dataset.from_list(CHATS)


OBJECTS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "Dataset": (whole, CHATS),
    "DatasetDict": (lambda: splits_of(train=whole(), test=whole()), CHATS),
    "streaming dataset": (lambda: whole().to_iterable_dataset(), CHATS),
    "streaming splits": (
        lambda: datasets.IterableDatasetDict({"train": whole().to_iterable_dataset()}),
        CHATS,
    ),
    "DataFrame": (lambda: pd.DataFrame(CHATS), CHATS),
    "list of rows": (lambda: CHATS, CHATS),
    "generator of rows": (lambda: iter(CHATS), CHATS),
    "list of strings": (lambda: [row["text"] for row in TEXTS], TEXTS),
    "generator of strings": (lambda: (row["text"] for row in TEXTS), TEXTS),
    "torch Dataset": (Rows, CHATS),
    "torch IterableDataset": (Stream, CHATS),
}
"""What Python takes besides."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """TRL's own token rows."""
    folder = tmp_path_factory.mktemp("trl")
    return {
        id(TEXTS): of_trl(TEXTS, folder),
        id(CHATS): of_trl(CHATS, folder, assistant_only_loss=True),
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub with one dataset."""
    load = datasets.load_dataset

    def loaded(name: str, **options: Any) -> Any:
        if name != "someone/chats":
            return load(name, **options)
        return splits_of(train=whole())

    monkeypatch.setattr(datasets, "load_dataset", loaded)


def trained_rows(data: Any, **options: Any) -> list[Any]:
    """Return the rows that `QuantizedLoRA.train` would train on."""
    tuning = FineTuning(
        small_model(), data, tokenizer=chat_tokenizer(), options={"max_steps": 1, **options}
    )
    return [
        {name: row[name] for name in ("input_ids", "labels")}
        for row in tuning.trainer.train_dataset
    ]


def only_tokens(rows: list[Any]) -> list[Any]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


def test_every_ending_has_a_case() -> None:
    assert [ending for ending, _, _ in READERS] == list(FILES)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("source", SOURCES)
def test_from_python(source: str, expected: dict[int, list[Any]], tmp_path: Path) -> None:
    make, rows = SOURCES[source]
    assert trained_rows(make(tmp_path)) == only_tokens(expected[id(rows)])


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("source", SOURCES)
def test_from_the_command_line(source: str, tmp_path: Path) -> None:
    make, rows = SOURCES[source]
    data = make(tmp_path)
    paths = tuple(map(str, data)) if isinstance(data, list) else (str(data),)
    run = TrainingRun(RunSettings(model="demo", data=paths, held_out=0.0))
    run.check_quickly()
    found = run.rows().table
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        assert json.dumps(row).replace(', "name": "n"', "") == json.dumps(wanted)


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects(kind: str, expected: dict[int, list[Any]]) -> None:
    make, rows = OBJECTS[kind]
    assert trained_rows(make()) == only_tokens(expected[id(rows)])


def test_splits_are_held_out(tmp_path: Path) -> None:
    path = saved_splits(tmp_path)
    found = TrainingRun(RunSettings(model="demo", data=(str(path),))).rows()
    assert (len(found.table), len(found.held_out)) == (len(CHATS), 2)
    found = TrainingRun(RunSettings(model="demo", data=(str(jsonl(tmp_path)),))).rows()
    assert (len(found.table), len(found.held_out)) == (len(CHATS) - 1, 1)


def damaged(folder: Path, text: str | bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: f / "b.jsonl", "b.jsonl': the file does not exist; check the path"),
    "no Hub name": (lambda f: "chats", "'chats': the file does not exist"),
    "absent on the Hub": (lambda f: "no/such", "'no/such': .*; check the name"),
    "an ending": (lambda f: damaged(f, "a", "a.doc"), "a.doc': the ending '.doc' is unknown; re"),
    "empty": (lambda f: damaged(f, ""), "it is empty; pass a file of rows"),
    "no rows": (lambda f: damaged(f, "text\n", "a.csv"), "it has no rows"),
    "no JSON": (
        lambda f: damaged(f, '{"text": "a"}\n{"text": \n'),
        r"a.jsonl': row 2 is not JSON .*'\{\"text\":'; write one JSON object per line",
    ),
    "no JSON in gzip": (
        lambda f: packed(damaged(f, '{"text": "a"}\n{"text": \n')),
        r"a.jsonl.gz': row 2 is not JSON",
    ),
    "no objects": (lambda f: damaged(f, "1\n2\n"), "a.jsonl': row 1 is not a JSON object: '1'"),
    "too many fields": (
        lambda f: damaged(f, "text,label\na,b\na,b,c\n", "a.csv"),
        "a.csv': .*Expected 2 fields in line 3, saw 3",
    ),
    "not UTF-8": (
        lambda f: damaged(f, b"text\ncaf\xe9\n", "a.csv"),
        "a.csv': byte 8 is not UTF-8; convert the file",
    ),
    "an empty folder": (lambda f: f, "no saved dataset and no file with .jsonl, .json"),
    "files with other columns": (
        lambda f: [jsonl(f), jsonl(f, TEXTS, "b.jsonl")],
        "b.jsonl': it has the columns text, but .*a.jsonl has messages; give all files",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_one_error(fault: str, tmp_path: Path) -> None:
    make, message = BAD_FILES[fault]
    with pytest.raises(DataSourceError, match=message):
        read(make(tmp_path))


def test_bad_objects() -> None:
    for data, error in (
        ([], EmptyDatasetError),
        (whole().select([]), EmptyDatasetError),
        (3, DatasetTypeError),
        (["a", {"text": "b"}], DatasetTypeError),
        (splits_of(test=whole()), SplitNameError),
        ([{"text": "a"}, {"text": ["b"]}], DataSourceError),
    ):
        with pytest.raises(error, match=r"; |dataset|row 1"):
            read(data)


MEASURED = """
import resource, sys, time
from pathlib import Path
from types import SimpleNamespace
import datasets
from qlora_compile.hf.trainer.objectives.sft import SFT
from qlora_compile.hf.trainer.preparation import enough_rows, training_rows
from qlora_compile.training.held_out import with_held_out
began = time.monotonic()
args = SimpleNamespace(max_steps=60, train_batch_size=4, world_size=1, seed=0, packing=True,
                       gradient_accumulation_steps=1, max_length=256)
rows = enough_rows(with_held_out(training_rows(Path(sys.argv[1]), SFT), 0.1, 0), args)
assert len(rows.table) <= 4096, len(rows.table)
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_a_large_file_costs_little(tmp_path: Path) -> None:
    size = 200 if LONG else 20  # MB
    row = {"messages": [{"role": "user", "content": "q " * 100}, CHATS[0]["messages"][1]]}
    row["messages"][1] = {"role": "assistant", "content": "answer " * 100}
    text = f"{json.dumps(row)}\n"
    figures = []
    for megabytes in (1, size):
        file = tmp_path / f"{megabytes}.jsonl"
        with file.open("w") as out:
            out.writelines(text for _ in range(megabytes * 2**20 // len(text)))
        # Files of one content in datasets' cache would be one.
        env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(file)],
            cwd=ROOT,
            env=env,
            check=True,
            capture_output=True,
            text=True,
        )
        figures.append([float(value) for value in done.stdout.split()])
    (seconds, megabytes), (more_seconds, more_megabytes) = figures
    assert more_megabytes - megabytes < 300 * max(size / 200, 0.5)
    assert more_seconds - seconds < 10
