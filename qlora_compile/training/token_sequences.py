"""Turns documents into token sequences for training and verifying."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_compile.errors import SequenceLengthError, TokenizerVocabularyError, TooLittleTextError
from qlora_compile.training.documents import Document, pack


def check_sequence_length(length: int | None, config: Any, model: str) -> None:
    """Raise SequenceLengthError if `length` is more than the model of `config` can take."""
    from qlora_compile.hf.loading import longest_sequence

    limit = longest_sequence(config)
    if limit is not None and length is not None and length > limit:
        raise SequenceLengthError(value=length, model=model, limit=limit)


def token_sequences(
    documents: Sequence[Document],
    tokenizer: Any,
    config: Any,
    length: int,
    *,
    data: str,
    purpose: str,
) -> list[list[int]]:
    """Return sequences of `length` tokens; without documents, none.

    data and purpose only appear in error messages.

    Raises:
        TooLittleTextError: the documents do not fill one sequence.
        TokenizerVocabularyError: the tokenizer belongs to another model.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    sequences = pack(documents, encode, tokenizer.eos_token_id, length)
    if documents and not sequences:
        raise TooLittleTextError(
            value=data,
            count="less than one sequence",
            unit=f"of {length} tokens",
            purpose=f"{purpose} text",
            needed="one or more",
            option="--sequence-length",
        )
    largest = config.get_text_config().vocab_size - 1
    highest = max(map(max, sequences), default=0)
    if highest > largest:
        raise TokenizerVocabularyError(site=data, value=highest, largest=largest)
    return sequences
