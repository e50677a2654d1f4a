"""Errors of records and tuning; their base class is in qlora_compile/errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class InvalidRecordError(QloraCompileError, ValueError):
    template = "a record cannot hold {field}={value!r}; use {allowed}"


class RecordLineError(QloraCompileError, ValueError):
    template = "no record that this version reads: {problem}"


class RecordFileError(QloraCompileError, ValueError):
    template = "records in {value!r}: {problem}; {remedy}"


class RecordKeyError(QloraCompileError, ValueError):
    template = "record {value!r}: {problem}; `qlora-compile records list` shows the keys"


class FingerprintError(QloraCompileError):
    template = "{device!r} has no fingerprint: {problem}; nothing measured on it can be kept"


class NoCorrectVariantError(QloraCompileError):
    template = "no variant computes {problem} correctly here:\n{reasons}"


class TuningProcessError(QloraCompileError):
    template = (
        "the process that measures kernels ended before it ran one: {problem}; its message is "
        "above; optimize(..., tune='model') measures nothing"
    )


class TuneModeError(QloraCompileError, ValueError):
    template = (
        "tune={value!r} is neither 'auto', 'off' or 'model' nor the path of an existing file or "
        "folder of records"
    )


class CandidateError(QloraCompileError):
    template = "measuring {candidate} for {problem} raised\n{traceback}"
