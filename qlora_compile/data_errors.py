"""Errors of training data: files, rows, chat templates; their base class is in errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class DataSourceError(QloraCompileError, ValueError):
    template = "cannot read data from {value!r}: {problem}; {remedy}"


class DataRowError(QloraCompileError, ValueError):
    template = "{site}: {column} is {value}; {remedy}"


class DataColumnsError(QloraCompileError, ValueError):
    template = (
        "{site} has the columns {columns}, which make no known kind of row; give it the columns of "
        "one of {known}, or rename its own: --columns NAME=OWN (columns={{'NAME': 'OWN'}} in "
        "Python)"
    )


class ColumnNameError(QloraCompileError, ValueError):
    template = "columns: {name}={value!r} cannot be used: {problem}; {remedy}"


class ObjectiveRowsError(QloraCompileError, ValueError):
    template = (
        "{site} has rows of the kind {kind!r}, but the objective {objective!r} trains on {known}; "
        "{remedy}"
    )


class ObjectiveNameError(QloraCompileError, ValueError):
    template = "the objective {value!r} is unknown; choose one of {known}"


class ChatTemplateError(QloraCompileError, ValueError):
    template = "{site} has turns of a chat, but {problem}; {remedy}"


class SplitNameError(QloraCompileError, ValueError):
    template = "{site} has the splits {value}, none of them named train; pass one of them"


class NothingLearntError(QloraCompileError, ValueError):
    template = (
        "{site}: no row has anything to learn within max_length={value} tokens; pass a larger "
        "max_length"
    )
