"""Documents of plain text: reads them, holds some out, and packs them into token sequences."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_compile.errors import TextFileError, TooLittleTextError


@dataclass(frozen=True)
class Document:
    """A text that is held out or trained on as a whole."""

    name: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """Read the documents of a UTF-8 file: the `text` of each record of a .jsonl, else paragraphs.

    Raises:
        TextFileError: the path is missing or a directory, or the file is unreadable, not UTF-8,
            malformed or blank.
    """
    if path.is_dir():
        raise _unreadable(path, "this is a directory", "pass a text file or a .jsonl file")
    if not path.exists():
        raise _unreadable(path, "the file does not exist", "check the path")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(
            path, f"byte {error.start} is not UTF-8", "convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise _unreadable(path, str(error.strerror), "check the file's permissions") from error
    texts = _records(path, text) if path.suffix == ".jsonl" else _paragraphs(text)
    documents = [
        Document(f"{path.name}:{number}", part)
        for number, part in enumerate(texts, start=1)
        if part.strip()
    ]
    if not documents:
        raise _unreadable(path, "it holds no text", "pass a file that does")
    return documents


def split(
    documents: Sequence[Document], held_out: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Return training and held-out documents, each in the given order.

    held_out: the fraction of the documents to hold out, at least one document if it is not 0. The
    same seed gives the same split.

    Raises:
        TooLittleTextError: holding out would leave nothing to train on.
    """
    if held_out == 0:
        return list(documents), []
    count = max(1, round(len(documents) * held_out))
    if count >= len(documents):
        raise TooLittleTextError(
            value=documents[0].name,
            count=len(documents),
            unit="documents",
            purpose="training and held-out text together",
            needed=f"{count + 1} or more",
            option="--held-out (0 for none)",
        )
    chosen = set(random.Random(seed).sample(range(len(documents)), count))
    kept = [document for index, document in enumerate(documents) if index not in chosen]
    return kept, [documents[index] for index in sorted(chosen)]


def pack(
    documents: Sequence[Document],
    encode: Callable[[str], list[int]],
    separator: int | None,
    length: int,
) -> list[list[int]]:
    """Return token sequences of exactly `length`, filled across documents; drop the remainder."""
    stream: list[int] = []
    for document in documents:
        stream.extend(encode(document.text))
        if separator is not None:
            stream.append(separator)
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def _paragraphs(text: str) -> list[str]:
    parts: list[str] = []
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            parts.append("\n".join(lines))
            lines = []
    return parts


def _records(path: Path, text: str) -> list[str]:
    texts = []
    # Not splitlines(), which also cuts at U+2028 and other characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _unreadable(
                path, f"line {number} is no JSON ({error.msg})", "write one JSON object per line"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise _unreadable(
                path, f'line {number} has no string "text"', 'give every line a "text"'
            )
        texts.append(record["text"])
    return texts


def _unreadable(path: Path, problem: str, remedy: str) -> TextFileError:
    return TextFileError(value=str(path), problem=problem, remedy=remedy)
