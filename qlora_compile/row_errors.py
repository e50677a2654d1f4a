"""Errors of a dataset's rows; their base class is in errors.py."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class RowColumnsError(QloraCompileError, ValueError):
    template = "row {row} {problem} {column}; give this column to all rows, or to none"


class RowTypeError(QloraCompileError, TypeError):
    template = "row {row}: {column} is {value}; it must be {wanted}"


class EmptyRowError(QloraCompileError, ValueError):
    template = "row {row}: {column} is {value} and holds no token; leave the row out"


class RowLengthError(QloraCompileError, ValueError):
    template = (
        "row {row}: {column} holds {value} tokens, but {model} has {limit} positions; "
        "cut the row, or split it into several"
    )


class RowTokenError(QloraCompileError, ValueError):
    template = (
        "row {row}: {column} holds token id {value}, but {model} knows ids 0 to {largest}; "
        "use the tokenizer that belongs to the model"
    )


class ColumnLengthError(QloraCompileError, ValueError):
    template = "row {row}: {column} holds {value} values instead of {length}; give {wanted}"


class RowLabelError(QloraCompileError, ValueError):
    template = (
        "row {row}: {column} holds {value}, but {model} knows labels 0 to {largest}; "
        "use these, and -100 where there is nothing to learn"
    )
