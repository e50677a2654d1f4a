"""Documents of plain text: holds some out, and packs them into token sequences."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qlora_compile.errors import TooLittleTextError


@dataclass(frozen=True)
class Document:
    """A text that is held out or trained on as a whole."""

    name: str
    text: str


Item = TypeVar("Item")


def split(documents: Sequence[Item], held_out: float, seed: int) -> tuple[list[Item], list[Item]]:
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
            value=getattr(documents[0], "name", "the text"),
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
