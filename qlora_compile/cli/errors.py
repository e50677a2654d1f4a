"""Errors of the command line's options; their base class is in qlora_compile/errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class BudgetError(QloraCompileError, ValueError):
    template = "--budget {value!r} is not a time; write seconds or minutes, such as 120s or 5m"


class DtypeChoiceError(QloraCompileError, ValueError):
    template = "--dtype {value!r} is unknown; choose one of {known}"


class ModelOrShapesError(QloraCompileError, ValueError):
    template = "{value} given; pass either --model or --shapes"


class ShapeError(QloraCompileError, ValueError):
    template = "--shapes: {value!r} {problem}; write MxNxKxR, such as 4096x4096x4096x16"


class NamedValueError(QloraCompileError, ValueError):
    template = "{option}: {value!r} is not of the form NAME=VALUE; write it so"


class MissingOptionError(QloraCompileError, ValueError):
    template = "{option} is missing; pass it"
