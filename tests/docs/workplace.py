"""Makes the files that the documentation's pages find in the current folder, at toy size."""

import json
from pathlib import Path

from tests.docs import toy_vision_language
from tests.hf.checkpoints.written import KINDS, written
from tests.hf.test_experts import toy as toy_experts
from tests.toy_language_model import chat_tokenizer, toy_llama

WORDS = "the quick brown fox jumps over the lazy dog"


def fill(folder: Path) -> None:
    """Write the models my-model, my-mixture, my-vlm and my-fp8-model, and some files of rows."""
    (folder / "my-fp8-model").mkdir()
    written(folder / "my-fp8-model", toy_llama(), KINDS["fp8"])
    toy_llama(longest=512).save_pretrained(folder / "my-model")
    for name in ("my-model", "my-fp8-model"):
        chat_tokenizer().save_pretrained(folder / name)
    toy_experts("mixtral").save_pretrained(folder / "my-mixture")
    toy_vision_language.write(folder / "my-vlm")
    question, answer = {"role": "user", "content": "what jumps?"}, "the fox"
    turns = [question, {"role": "assistant", "content": answer}]
    rows = {
        "text": lambda number: {"text": f"{number} {WORDS}"},
        "chat": lambda number: {"messages": turns},
        "preferences": lambda number: {
            "prompt": f"what jumps {number}?",
            "chosen": " the fox",
            "rejected": " the dog",
        },
        "reviews": lambda number: {
            "text": f"{number} {WORDS}",
            "label": "good" if number % 2 else "bad",
        },
    }
    for name, row in rows.items():
        lines = (json.dumps(row(number)) + "\n" for number in range(40))
        (folder / f"{name}.jsonl").write_text("".join(lines))
