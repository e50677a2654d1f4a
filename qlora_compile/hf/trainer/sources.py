"""Sources of training data: files, saved datasets, Hub names, and objects of several libraries.

Everything becomes a `datasets.Dataset` or a `datasets.IterableDataset`. Files are read by the
`datasets` library, which keeps them on disk in its cache and maps them into memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_compile.data_errors import DataSourceError, SplitNameError
from qlora_compile.errors import (
    DatasetTypeError,
    EmptyDatasetError,
    MissingPackageError,
)
from qlora_compile.hf.trainer.unreadable import DAMAGED, unreadable

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READERS = (
    (".jsonl", "json", {}),
    (".json", "json", {}),
    (".csv", "csv", {}),
    (".tsv", "csv", {"sep": "\t"}),
    (".parquet", "parquet", {}),
    (".txt", "text", {"sample_by": "paragraph"}),
    (".md", "text", {"sample_by": "paragraph"}),
)
"""Ending of a file, the builder of `datasets` that reads it, and the builder's options."""

COMPRESSED = ".gz"
HELD_OUT_SPLITS = ("validation", "valid", "dev", "eval", "test")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Origin:
    """Names the rows of a table in errors.

    files: the name of each file and its number of rows. Rows of files are counted from 1, as in
    editors; rows of other tables from 0, as in Python.
    """

    name: str = "the dataset"
    files: tuple[tuple[str, int], ...] = ()

    def row(self, number: int) -> str:
        """Return the name of the row with this index in the whole table."""
        starts = accumulate((count for _, count in self.files), initial=0)
        for (file, count), start in zip(self.files, starts, strict=False):
            if number < start + count:
                return f"{file}, row {number - start + 1}"
        return f"{self.name}, row {number}"


@dataclass(frozen=True)
class Rows:
    """The rows to train on, those to hold out if the source has such a split, and their names."""

    table: Dataset | IterableDataset
    origin: Origin
    held_out: Dataset | IterableDataset | None = None


def check_paths(data: Any) -> None:
    """Check without importing anything that paths exist and that their kind of file is known.

    Raises:
        DataSourceError: a path is missing, or its ending is unknown.
    """
    for path in _paths(data):
        if not path.is_dir() and not _is_hub_name(path):
            _reader(path)
    if find_spec("datasets") is None:
        raise MissingPackageError(purpose="reading training data", package="datasets")


def read(data: Any) -> Rows:
    """Read rows from `data`.

    data: the path of a file, of a folder with files or of one written by `save_to_disk`, a Hub
    name, or a list of these; a datasets.Dataset, DatasetDict, or one of the two that streams; a
    pandas DataFrame; an iterable of strings or of mappings.

    Raises:
        DataSourceError: a path is missing, or its file cannot be read.
        SplitNameError: a dictionary of splits has none to train on.
        DatasetTypeError: `data` is nothing of the kind.
        EmptyDatasetError: there are no rows.
    """
    check_paths(data)
    paths = _paths(data)
    rows = _read_paths(paths) if paths else _read_object(data)
    length = getattr(rows.table, "num_rows", None)
    if length == 0 or (not rows.table.column_names and length is not None):
        raise EmptyDatasetError(site=rows.origin.name)
    return rows


def is_path(data: Any) -> bool:
    """Whether `data` names files, folders or a dataset on the Hub."""
    return bool(_paths(data))


def _paths(data: Any) -> list[Path]:
    if isinstance(data, str | Path):
        return [Path(data)]
    if isinstance(data, list | tuple) and data and all(isinstance(each, Path) for each in data):
        return list(data)
    return []


def _is_hub_name(path: Path) -> bool:
    known = any(_plain(path).endswith(ending) for ending, _, _ in READERS)
    return not path.exists() and not known and _HUB_NAME.fullmatch(str(path)) is not None


def _plain(path: Path) -> str:
    """Return the file's name in lower case, without the ending of a compressed file."""
    return path.name.lower().removesuffix(COMPRESSED)


def _reader(path: Path) -> tuple[str, dict[str, Any]]:
    if not path.exists():
        remedy = "check the path, or pass the Hub name of a dataset as OWNER/NAME"
        raise DataSourceError(value=str(path), problem="the file does not exist", remedy=remedy)
    for ending, builder, options in READERS:
        if _plain(path).endswith(ending):
            return builder, options
    known = ", ".join(ending for ending, _, _ in READERS)
    raise DataSourceError(
        value=str(path),
        problem=f"the ending {path.suffix!r} is unknown",
        remedy=f"rename the file to one of {known}, each with or without {COMPRESSED}",
    )


def _read_paths(paths: list[Path]) -> Rows:
    if len(paths) == 1 and _is_hub_name(paths[0]):
        return _read_hub(str(paths[0]))
    if len(paths) == 1 and paths[0].is_dir():
        folder = paths[0]
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _read_saved(folder)
    files = [file for path in paths for file in (_files_in(path) if path.is_dir() else [path])]
    from datasets import concatenate_datasets

    tables = [_read_file(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table.column_names) != set(tables[0].column_names):
            raise DataSourceError(
                value=str(file),
                problem=f"it has the columns {', '.join(sorted(table.column_names))}, but "
                f"{files[0]} has {', '.join(sorted(tables[0].column_names))}",
                remedy="give all files the same columns",
            )
    table = tables[0] if len(tables) == 1 else concatenate_datasets(_alike(tables))
    counts = tuple((str(f), t.num_rows) for f, t in zip(files, tables, strict=True))
    return Rows(table, Origin(", ".join(map(str, files)), counts))


def _alike(tables: list[Dataset]) -> list[Dataset]:
    """Return the tables with one type for each column: JSON where types differ, so that the check
    of rows finds the row of another type."""
    from datasets import Json, List

    json: Any = Json()
    for name in tables[0].column_names:
        types = [table.features[name] for table in tables]
        if any(each != types[0] for each in types):
            lists = all(isinstance(each, List) for each in types)
            tables = [t.cast_column(name, List(json) if lists else json) for t in tables]
    return tables


def _files_in(folder: Path) -> list[Path]:
    endings = tuple(ending for ending, _, _ in READERS)
    files = sorted(file for file in folder.iterdir() if _plain(file).endswith(endings))
    if not files:
        raise DataSourceError(
            value=str(folder),
            problem=f"the folder holds no saved dataset and no file with {', '.join(endings)}",
            remedy="pass a folder written by save_to_disk, or one with such files",
        )
    return files


def _read_file(file: Path) -> Dataset:
    builder, options = _reader(file)
    if file.stat().st_size == 0:
        raise DataSourceError(value=str(file), problem="it is empty", remedy="pass a file of rows")
    from datasets import DownloadManager, load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        path: Any = str(file)
        if builder == "parquet" and file.suffix == COMPRESSED:  # the others unpack it themselves
            path = DownloadManager().extract(path)
        table: Any = load_dataset(builder, data_files=[path], split="train", **options)
    except (DatasetGenerationError, TypeError, *DAMAGED) as error:  # datasets 5.0: rows of numbers
        raise unreadable(file, error) from error
    import pyarrow

    pyarrow.default_memory_pool().release_unused()  # what reading took
    return table


def _read_saved(folder: Path) -> Rows:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except DAMAGED as error:
        raise unreadable(folder, error) from error
    return _of_splits(saved, str(folder)) if isinstance(saved, dict) else _named(saved, folder)


def _read_hub(name: str) -> Rows:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return _of_splits(load_dataset(name), name)
    except (DatasetGenerationError, OSError, ValueError) as error:
        problem = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataSourceError(
            value=name, problem=problem, remedy="check the name, or pass the path of a file"
        ) from error


def _named(table: Any, name: str | Path) -> Rows:
    return Rows(table, Origin(str(name), ((str(name), table.num_rows),)))


def _of_splits(splits: Any, name: str) -> Rows:
    if "train" not in splits:
        raise SplitNameError(site=name, value=", ".join(splits) or "none")
    held_out = next((splits[each] for each in HELD_OUT_SPLITS if each in splits), None)
    return Rows(splits["train"], Origin(name), held_out)


def _read_object(data: Any) -> Rows:
    import datasets

    if isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return Rows(data, Origin())
    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        return _of_splits(data, "the dataset")
    torch_stream = getattr(sys.modules.get("torch.utils.data"), "IterableDataset", ())
    if isinstance(data, torch_stream):
        return Rows(datasets.IterableDataset.from_generator(lambda: iter(data)), Origin())
    if type(data).__module__.startswith("pandas"):
        return Rows(_table(datasets.Dataset.from_pandas, data, preserve_index=False), Origin())
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping):
        data = [data[place] for place in range(len(data))]  # a torch Dataset, for example
    if isinstance(data, bytes | Mapping) or not isinstance(data, Iterable):
        raise DatasetTypeError(site="dataset", value=f"a {type(data).__name__}")
    rows = list(data)
    if not rows:
        raise EmptyDatasetError(site="the dataset")
    for number, row in enumerate(rows):
        if not isinstance(row, str | Mapping) or isinstance(row, str) != isinstance(rows[0], str):
            value = f"a {type(row).__name__} beside a {type(rows[0]).__name__}"
            raise DatasetTypeError(site=f"row {number}", value=value)
    texts = [{"text": row} if isinstance(row, str) else dict(row) for row in rows]
    names = list(dict.fromkeys(name for row in texts for name in row))
    columns = {name: [row.get(name) for row in texts] for name in names}
    return Rows(_table(datasets.Dataset.from_dict, columns), Origin())


def _table(make: Any, rows: Any, **options: Any) -> Any:
    import pyarrow

    try:
        return make(rows, **options)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise DataSourceError(
            value="the dataset",
            problem=str(error).splitlines()[0],
            remedy="give each column values of one type",
        ) from error
