"""Record: what was measured for one problem on one machine, and the JSON line that stores it.

A line is data, never code, and is read strictly: a line that differs in one byte from what
`to_line` writes is not taken for a record.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from qlora_compile.errors import LayoutTextError
from qlora_compile.json_text import parsed_json
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem
from qlora_compile.kernels.selection import BASELINE
from qlora_compile.tuning.errors import InvalidRecordError, RecordLineError
from qlora_compile.tuning.fingerprint import Fingerprint
from qlora_compile.tuning.timings import Timings

VERSION = 3
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
"""The dtypes by name. A dtype in a line is looked up here, never in torch."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_VERSION_KEY = "qlora_compile_record"
_DIGEST_KEY = "sha256"

T = TypeVar("T")
Key = tuple[Problem, Fingerprint]
"""The key of a record: its portable problem and its fingerprint."""


def portable(problem: Problem) -> Problem:
    """Return `problem` with its device reduced to the type, so that cuda:0 and cuda:3 share
    records."""
    return dataclasses.replace(problem, device=torch.device(problem.device).type)


def key_digest(key: Key) -> str:
    """Return hex digits that name a key, in file names and for people."""
    return hashlib.sha256(_json([_plain(part) for part in key]).encode()).hexdigest()


def utc_now() -> str:
    """Return the present time in the form of `Record.measured_at`."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Record(Timings):
    """Timings of a portable `problem` under a fingerprint; `measured_at` is ISO 8601 in UTC.

    Raises InvalidRecordError if a field breaks a rule stated here or in Timings.
    """

    problem: Problem
    fingerprint: Fingerprint
    measured_at: str

    def __post_init__(self) -> None:
        if self.problem.device != torch.device(self.problem.device).type:
            raise _invalid("problem.device", self.problem.device, "record.portable(problem)")
        for field in dataclasses.fields(self.problem):
            value = getattr(self.problem, field.name)
            if isinstance(value, torch.dtype) and value not in _DTYPE_NAMES:
                raise _invalid(f"problem.{field.name}", value, f"one of {', '.join(DTYPES)}")
        if not self.timings:
            raise _invalid("timings", self.timings, "the timing of at least one candidate")
        for timing in filter(None, (self.baseline, *self.timings)):
            if not (math.isfinite(timing.seconds) and timing.seconds > 0):
                raise _invalid("seconds", timing.seconds, "a finite number > 0")
            if not (math.isfinite(timing.spread) and timing.spread >= 0):
                raise _invalid("spread", timing.spread, "a finite number >= 0")
        seconds = [timing.seconds for timing in self.timings[1:]]
        if seconds != sorted(seconds):
            raise _invalid("timings", seconds, "the choice and then the others, fastest first")
        if self.advantage is not None:
            low, high = self.advantage.low, self.advantage.high
            if not 1 < low <= high < math.inf:
                raise _invalid("advantage", (low, high), "an interval of finite numbers above 1")
        load = [value for value in dataclasses.astuple(self.load) if value is not None]
        if not all(0 <= value < math.inf for value in load):
            raise _invalid("load", load, "finite numbers >= 0")
        if self.baseline is not None and self.baseline.variant != BASELINE:
            raise _invalid("baseline", self.baseline.variant, f"the variant {BASELINE}")
        _ = self.measured  # raises for a bad time: records are compared by it

    @property
    def key(self) -> Key:
        return self.problem, self.fingerprint

    @property
    def measured(self) -> datetime:
        """`measured_at` as a datetime, to be compared."""
        try:
            time = datetime.fromisoformat(self.measured_at)
        except ValueError:
            time = None
        if time is None or not self.measured_at.endswith("+00:00"):
            raise _invalid("measured_at", self.measured_at, "2026-01-31T12:00:00+00:00, in UTC")
        return time


def by_problem(records: Iterable[Record]) -> dict[Problem, list[Record]]:
    """Return lists of `records`, one list for each portable problem."""
    found: dict[Problem, list[Record]] = {}
    for record in records:
        found.setdefault(record.problem, []).append(record)
    return found


def latest(
    records: Mapping[Problem, Iterable[Record]], problem: Problem, here: Fingerprint
) -> Record | None:
    """Return the newest record of `problem` among those that `here` covers, None if none does."""
    fitting = (each for each in records.get(portable(problem), ()) if here.covers(each.fingerprint))
    return max(fitting, key=lambda record: record.measured, default=None)


def _invalid(field: str, value: object, allowed: str) -> InvalidRecordError:
    return InvalidRecordError(field=field, value=value, allowed=allowed)


def to_line(record: Record) -> str:
    """Return a record as one line of JSON, ASCII, without the newline."""
    return written_line(record, _VERSION_KEY, VERSION)


def from_line(line: str) -> Record:
    """Parse a line, with or without a newline at its end.

    Raises:
        RecordLineError: `to_line` did not make the line; the error says what is wrong.
    """
    return read_line(Record, line, _VERSION_KEY, VERSION)


def written_line(value: Any, version_key: str, version: int) -> str:
    """Return a dataclass of plain fields as one line of JSON with a digest, ASCII, no newline."""
    body = _plain(value)
    return _json({version_key: version, _DIGEST_KEY: _digest(body), **body})


def read_line(kind: type[T], line: str, version_key: str, expected: int) -> T:
    """Return the `kind` of dataclass that `written_line` wrote as `line`.

    Raises:
        RecordLineError: `written_line` did not write the line; the error says what is wrong.
    """
    try:
        body = parsed_json(line)
    except ValueError as error:
        raise RecordLineError(problem=f"not JSON, or truncated ({error})") from error
    if not isinstance(body, dict) or version_key not in body:
        raise RecordLineError(problem="JSON of something else")
    version = body.pop(version_key)
    if type(version) is not int or version != expected:
        raise RecordLineError(problem=f"it is of version {version!r:.40}, this is {expected}")
    if body.pop(_DIGEST_KEY, None) != _digest(body):
        raise RecordLineError(problem="its content does not match its digest")
    try:
        value = _decoded(kind, body, "the record")
    except InvalidRecordError as error:
        raise RecordLineError(problem=str(error)) from error
    # JSON may have spaces, repeated names, and other spellings of a number or a letter. The digest
    # is of what was read and does not notice them.
    if written_line(value, version_key, expected) != line.rstrip("\r\n"):
        raise RecordLineError(problem="it was edited, its digest is of another spelling")
    return value


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _digest(body: object) -> str:
    try:
        return hashlib.sha256(_json(body).encode()).hexdigest()
    except ValueError as error:  # NaN, Infinity, or nested beyond reason
        raise RecordLineError(problem=str(error)) from error


def _plain(value: object) -> Any:
    """Return `value` as lists, dictionaries and other values that JSON can express."""
    if isinstance(value, torch.dtype):
        return _DTYPE_NAMES[value]
    if isinstance(value, Layout):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    return value


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decoded(kind: Any, value: Any, site: str) -> Any:
    """Invert `_plain` for a value of type `kind`. Raises RecordLineError if it is none."""
    if kind is Layout and isinstance(value, str):
        try:
            return Layout.parse(value)
        except LayoutTextError as error:
            raise RecordLineError(problem=str(error)) from error
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        types = _types(kind)
        if not isinstance(value, dict) or value.keys() != types.keys():
            held = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            problem = f"{site} holds {held:.200}, and should hold {', '.join(types)}"
            raise RecordLineError(problem=problem)
        return kind(**{name: _decoded(types[name], value[name], name) for name in types})
    items = get_args(kind)
    if type(None) in items:
        return None if value is None else _decoded(items[0], value, site)
    if get_origin(kind) is tuple and isinstance(value, list):
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) == len(value):
            return tuple(_decoded(*pair, site) for pair in zip(items, value, strict=True))
    if kind is torch.dtype and isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    named = get_origin(kind) is Literal and isinstance(value, str) and value in items
    if named or type(value) is kind:
        return value
    raise RecordLineError(problem=f"{site} cannot be {value!r:.80}")
