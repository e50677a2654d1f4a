"""Errors about the instructions that a user asks for."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class UnknownCpuLevelError(QloraCompileError, ValueError):
    template = (
        "the environment variable {variable} is {value!r}, which names no set of instructions; "
        "set it to one of {levels}, or leave it unset for the best that the processor has"
    )
