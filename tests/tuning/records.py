"""Sample records, which are like real ones except for what a test changes."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from qlora_compile.kernels.formats.formats import FORMATS
from qlora_compile.kernels.layout import Layout
from qlora_compile.kernels.problem import Problem, Sibling
from qlora_compile.tuning.fingerprint import Fingerprint
from qlora_compile.tuning.load import Load
from qlora_compile.tuning.record import Record
from qlora_compile.tuning.timings import Advantage, Timing

_BY_TYPE: dict[Any, Any] = {
    int: 64,
    str: "nf4",
    bool: True,
    torch.dtype: torch.bfloat16,
    Layout: FORMATS[0].usual_layout((64, 64)),
    tuple[Sibling, ...]: (Sibling(48, 32, True), Sibling(16, 32, False)),
}


def problem_fields() -> dict[str, Any]:
    """Return the name and type of every field of a problem."""
    hints = get_type_hints(Problem)
    return {field.name: hints[field.name] for field in dataclasses.fields(Problem)}


def sample_problem(*, n: int | None = None, **changed: Any) -> Problem:
    """Return a sample problem. n: rows of the weight, in place of the layout's."""
    values = {
        name: get_args(kind)[0] if get_origin(kind) is Literal else _BY_TYPE[kind]
        for name, kind in problem_fields().items()
    }
    problem = Problem(**{**values, "device": "cpu", **changed})
    return problem if n is None else replace(problem, layout=problem.layout.with_rows(n))


def real_problem(**changed: Any) -> Problem:
    """Return one that a CPU solves in no time."""
    values = {"m": 8, "layout": FORMATS[0].layout((24, 64)), "rank": 2}
    dtypes = dict.fromkeys(("x_dtype", "compute_dtype", "lora_dtype", "out_dtype"), torch.float32)
    flags = {"bias": False, "dropout": False, "keeps_low_rank": False, "siblings": ()}
    return sample_problem(**{**values, **dtypes, **flags, **changed})


def sample_fingerprint(**changed: Any) -> Fingerprint:
    values = {
        "kernels": (("dense", "5" * 64), ("fused", "6" * 64), ("tail", "7" * 64)),
        "torch": "2.13.0 cuda=None hip=None",
        "triton": "none",
        "driver": "none",
        "device": "a CPU",
        "threads": 2,
    }
    return Fingerprint(**{**values, **changed})


def changed_fingerprints() -> dict[str, Fingerprint]:
    """Return the sample with another value of one field, by that field's name."""
    values = {"threads": 3, "kernels": (("dense", "0" * 64),)}
    return {
        field.name: sample_fingerprint(**{field.name: values.get(field.name, "other")})
        for field in dataclasses.fields(Fingerprint)
    }


def sample_record(
    problem: Problem | None = None,
    fingerprint: Fingerprint | None = None,
    seconds: float = 0.001,
    day: int = 1,
    **changed: Any,
) -> Record:
    """Return a record whose winner took `seconds`, measured on a day of January."""
    values = {
        "problem": sample_problem() if problem is None else problem,
        "fingerprint": sample_fingerprint() if fingerprint is None else fingerprint,
        "timings": (
            Timing("tail", "64×64", seconds, seconds / 50),
            Timing("fused", "32×128, 4 warps", seconds * 1.25, seconds / 40),
        ),
        "baseline": Timing("dense", "-", seconds * 2, seconds / 30),
        "advantage": Advantage("dense -", 1.5, 2.25, 12),
        "load": Load(0.05, 1.01, 0.1, None, 2.0),
        "rejected": (("skinny -", 'takes up to 16 rows,\n"not 64"'),),
        "measured_at": f"2026-01-{day:02}T12:00:00+00:00",
    }
    return Record(**{**values, **changed})
