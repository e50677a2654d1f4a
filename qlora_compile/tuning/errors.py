"""Errors of records and tuning; their base class is in qlora_compile/errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class InvalidRecordError(QloraCompileError, ValueError):
    template = "a record cannot hold {field}={value!r}; use {allowed}"


class RecordLineError(QloraCompileError, ValueError):
    template = "not a record that this version reads: {problem}"


class RecordFileError(QloraCompileError, ValueError):
    template = "records in {value!r}: {problem}; {remedy}"


class RecordKeyError(QloraCompileError, ValueError):
    template = "record {value!r}: {problem}; `qlora-compile records list` shows the keys"


class FingerprintError(QloraCompileError):
    template = "{device!r} has no fingerprint: {problem}; no measurement on it can be kept"


class NoCorrectVariantError(QloraCompileError):
    template = "no variant computes {problem} correctly here:\n{reasons}"


class TuningProcessError(QloraCompileError):
    template = (
        "the process that measures kernels ended before it ran one: {problem}; its message is "
        "above; to measure nothing, pass tune='model' to optimize"
    )


class TuneModeError(QloraCompileError, ValueError):
    template = (
        "tune={value!r} cannot be used; pass 'auto', 'off', 'model', or the path of an existing "
        "file or folder of records"
    )


class CandidateError(QloraCompileError):
    template = "measuring {candidate} for {problem} raised\n{traceback}"
