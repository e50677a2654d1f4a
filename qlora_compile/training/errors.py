"""Errors of a run of the command line; their base class is in qlora_compile/errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class SettingsFileError(QloraCompileError, ValueError):
    template = (
        "cannot read settings from {value!r}: {problem}; pass a run's run.yaml, or a file like it"
    )


class MissingSettingError(QloraCompileError, ValueError):
    template = "{name} is missing; pass it, or a --config file that sets it"


class AdapterFolderError(QloraCompileError, ValueError):
    template = "no adapter can be loaded from {value!r}: {problem}; {remedy}"


class MergedFromError(QloraCompileError, ValueError):
    template = (
        "{value!r} does not tell what it was merged from: {problem}; pass --adapter, the folder of "
        "the adapter that was merged"
    )


class RewardFunctionError(QloraCompileError, ValueError):
    template = "--reward {value!r}: {problem}; write FILE.py:FUNCTION or MODULE:FUNCTION"
