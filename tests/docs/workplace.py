"""What the pages of the documentation find in the current folder, at toy size."""

import json
from pathlib import Path

from tests.hf.checkpoints.written import KINDS, written
from tests.toy_language_model import chat_tokenizer, toy_llama

WORDS = "the quick brown fox jumps over the lazy dog"


def fill(folder: Path) -> None:
    """Write my-model, my-fp8-model, text.jsonl and chat.jsonl into `folder`."""
    (folder / "my-fp8-model").mkdir()
    written(folder / "my-fp8-model", toy_llama(), KINDS["fp8"])
    toy_llama(longest=512).save_pretrained(folder / "my-model")
    chat_tokenizer().save_pretrained(folder / "my-model")
    texts = [{"text": f"{number} {WORDS}"} for number in range(40)]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"what jumps {number}?"},
                {"role": "assistant", "content": "the fox"},
            ]
        }
        for number in range(40)
    ]
    for name, rows in (("text.jsonl", texts), ("chat.jsonl", chats)):
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text("".join(lines))
