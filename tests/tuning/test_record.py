"""Records: what they hold, and that a line is read back as it was written or not at all."""

import hashlib
import json
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile.errors import QloraCompileError
from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem, Sibling
from qlora_compile.tuning.errors import InvalidRecordError, RecordLineError
from qlora_compile.tuning.fingerprint import Fingerprint
from qlora_compile.tuning.load import Load
from qlora_compile.tuning.record import (
    DTYPES,
    Record,
    from_line,
    key_digest,
    portable,
    to_line,
    utc_now,
)
from qlora_compile.tuning.timings import Advantage, Timing
from tests.tuning.records import (
    changed_fingerprints,
    problem_fields,
    sample_problem,
    sample_record,
)

BY_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(0, 2**70),
    str: st.text(),
    bool: st.booleans(),
    torch.dtype: st.sampled_from(list(DTYPES.values())),
}
SIBLINGS = st.builds(Sibling, BY_TYPE[int], BY_TYPE[int], BY_TYPE[bool])
_NAMES = st.from_regex(r"\A\w+\Z")
BY_TYPE[Layout] = st.builds(
    lambda format, shape, parameters: Layout.of(format, shape, **parameters),
    *(_NAMES, st.tuples(BY_TYPE[int], BY_TYPE[int])),
    st.dictionaries(_NAMES.filter(lambda name: name not in ("format", "shape")), BY_TYPE[int]),
)
BY_TYPE[tuple[Sibling, ...]] = st.lists(SIBLINGS, max_size=3).map(tuple)
PROBLEMS = st.builds(
    Problem,
    **{
        name: st.sampled_from(get_args(kind)) if get_origin(kind) is Literal else BY_TYPE[kind]
        for name, kind in problem_fields().items()
        if name != "device"
    },
    device=st.sampled_from(["cpu", "cuda"]),
)
SECONDS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
SPREADS = st.floats(min_value=0, allow_infinity=False)
TIMINGS = st.builds(Timing, st.text(), st.text(), SECONDS, SPREADS)
GAINS = st.floats(min_value=1, exclude_min=True, allow_infinity=False)
ADVANTAGES = st.builds(
    lambda over, gains, rounds: Advantage(over, min(gains), max(gains), rounds),
    *(st.text(), st.tuples(GAINS, GAINS), st.integers(0, 400)),
)
LOADS = st.builds(Load, SPREADS, SPREADS, *[st.none() | SPREADS] * 3)
KERNELS = st.lists(st.tuples(st.text(), st.text())).map(tuple)
FINGERPRINTS = st.builds(Fingerprint, KERNELS, *[st.text()] * 4, st.integers(0, 1024))
RECORDS = st.builds(
    Record,
    timings=st.lists(TIMINGS, min_size=1).map(
        lambda timings: (timings[0], *sorted(timings[1:], key=lambda timing: timing.seconds))
    ),
    advantage=st.none() | ADVANTAGES,
    load=LOADS,
    baseline=st.none() | st.builds(Timing, st.just("dense"), st.text(), SECONDS, SPREADS),
    rejected=st.lists(st.tuples(st.text(), st.text())).map(tuple),
    problem=PROBLEMS,
    fingerprint=FINGERPRINTS,
    measured_at=st.datetimes().map(lambda time: f"{time.isoformat()}+00:00"),
)


@given(RECORDS)
def test_a_line_is_read_back_as_it_was_written(record):
    line = to_line(record)
    assert line.isascii()
    assert line.isprintable()
    assert from_line(line) == from_line(f"{line}\r\n") == record
    assert json.loads(line)["qlora_compile_record"] == 3


@given(RECORDS, st.data())
def test_a_changed_byte_is_noticed(record, data):
    line = to_line(record).encode()
    place = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != line[place]))
    changed = line[:place] + bytes([other]) + line[place + 1 :]
    with pytest.raises(RecordLineError):
        from_line(changed.decode("ascii", errors="replace"))


def test_a_truncated_line_is_noticed_wherever_it_ends():
    line = to_line(sample_record())
    for end in range(len(line)):
        with pytest.raises(RecordLineError, match="not JSON, or truncated"):
            from_line(line[:end])


def resealed(line: str, **changed: Any) -> str:
    """Return the line with other fields and the digest that belongs to them; `...` removes one."""
    body = {name: value for name, value in {**json.loads(line), **changed}.items() if value != ...}
    version = body.pop("qlora_compile_record", None)
    body.pop("sha256")
    digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    head = {} if version is None else {"qlora_compile_record": version}
    return json.dumps({**head, "sha256": digest, **body}, separators=(",", ":"))


LINE = to_line(sample_record())
BODY = json.loads(LINE)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "JSON of something else"),
        ('{"text": "a document"}', "JSON of something else"),
        (resealed(LINE, qlora_compile_record=2), "it is of version 2, this is 3"),
        (resealed(LINE, qlora_compile_record=True), "it is of version True"),
        (LINE.replace('"seconds":0.001', '"seconds":0.002'), "does not match its digest"),
        (LINE.replace('"seconds":0.001,', '"seconds":NaN,'), "not JSON compliant"),
        (LINE.replace('"seconds":0.001', '"seconds": 0.001'), "it was edited"),
        (LINE.replace('"seconds":0.001,', '"seconds":1e-3,'), "it was edited"),
        (resealed(LINE, colour="red"), "the record holds .*colour, and should hold timings"),
        (resealed(LINE, timings=...), "the record holds baseline"),
        (resealed(LINE, problem=3), "problem holds int, and should hold direction"),
        (resealed(LINE, problem={**BODY["problem"], "m": "64"}), "m cannot be '64'"),
        (resealed(LINE, problem={**BODY["problem"], "m": True}), "m cannot be True"),
        (resealed(LINE, problem={**BODY["problem"], "bias": 1}), "bias cannot be 1"),
        (resealed(LINE, problem={**BODY["problem"], "direction": "up"}), "direction cannot be"),
        (resealed(LINE, problem={**BODY["problem"], "x_dtype": "load"}), "x_dtype cannot be"),
        (resealed(LINE, problem={**BODY["problem"], "x_dtype": ["int8"]}), "x_dtype cannot be"),
        (resealed(LINE, problem={**BODY["problem"], "device": "cuda:1"}), "problem.device="),
        (resealed(LINE, rejected=[["a", "b", "c"]]), "rejected cannot be"),
        (resealed(LINE, rejected={}), "rejected cannot be"),
        (resealed(LINE, timings=[]), "timings="),
        (resealed(LINE, baseline=BODY["timings"][0]), "baseline='tail'; use the variant dense"),
        (resealed(LINE, load=...), "the record holds timings, .*, and should hold .*, load"),
        (resealed(LINE, load={**BODY["load"], "drift": "fast"}), "drift cannot be 'fast'"),
        (resealed(LINE, measured_at="today"), "measured_at='today'"),
    ],
)
def test_what_is_no_record_says_what_it_is(line, problem):
    with pytest.raises(RecordLineError, match=problem) as caught:
        from_line(line)
    assert isinstance(caught.value, QloraCompileError)
    assert isinstance(caught.value, ValueError)


def test_resealing_alone_changes_nothing():
    assert resealed(LINE) == LINE


@pytest.mark.parametrize(
    "changed",
    [
        {"problem": sample_problem(device="cuda:0")},
        {"problem": sample_problem(x_dtype=torch.int8)},
        {"timings": ()},
        {"timings": tuple(Timing("a", "-", float(s), 0.0) for s in (2, 2, 1))},
        {"timings": (Timing("a", "-", float("nan"), 0.0),)},
        {"timings": (Timing("a", "-", 0.0, 0.0),)},
        {"timings": (Timing("a", "-", 1.0, -1.0),)},
        {"baseline": Timing("fused", "-", 1.0, 0.0)},
        {"advantage": Advantage("dense -", 1.0, 2.0, 9)},
        {"advantage": Advantage("dense -", 2.0, 1.5, 9)},
        {"load": Load(spread=float("nan"))},
        {"load": Load(others=-1.0)},
        {"measured_at": "2026-01-31T12:00:00"},
        {"measured_at": "2026-01-31T12:00:00+01:00"},
    ],
)
def test_a_record_that_makes_no_sense_cannot_be_made(changed):
    with pytest.raises(InvalidRecordError, match="a record cannot hold"):
        sample_record(**changed)


def test_what_a_record_says():
    record = sample_record(seconds=0.001)
    assert record.winner is record.timings[0]
    assert record.runner_up is record.timings[1]
    assert record.gain == pytest.approx(2.0)
    assert record.margin == pytest.approx(1.25)
    alone = sample_record(timings=record.timings[:1])
    assert alone.runner_up is None
    assert alone.margin is None
    assert sample_record(measured_at=utc_now()).measured > record.measured


def test_whole_numbers_are_seconds_too():
    record = sample_record(seconds=1)
    assert from_line(to_line(record)) == record


def test_ranks_share_a_key():
    records = [sample_record(portable(sample_problem(device=f"cuda:{rank}"))) for rank in (0, 3)]
    assert records[0].key == records[1].key
    assert records[0].problem.device == "cuda"


def test_every_field_of_a_key_counts():
    record = sample_record()
    digests = {key_digest(record.key)}
    digests |= {key_digest((record.problem, each)) for each in changed_fingerprints().values()}
    other = {int: 65, str: "cuda", bool: False, torch.dtype: torch.float32}
    other[tuple[Sibling, ...]] = ()
    other[Layout] = FORMATS[0].layout((64, 64))
    for name, kind in problem_fields().items():
        value = get_args(kind)[1] if get_origin(kind) is Literal else other[kind]
        digests.add(key_digest((sample_problem(**{name: value}), record.fingerprint)))
    assert len(digests) == 1 + 6 + len(problem_fields())
