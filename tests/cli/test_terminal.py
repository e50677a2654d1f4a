"""What the commands print is whole in a real terminal of 80 columns, which tmux provides."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from qlora_compile import api
from qlora_compile.capture import backend
from qlora_compile.cli.app import app
from qlora_compile.report import Report
from tests.cli.test_after_training import adapter

__all__ = ["adapter"]

pytestmark = pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux, Debian's package of that name, is not installed"
)

END = "end of the output"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a terminal of 80 columns; returns what the terminal then shows, without the
    line breaks of its own."""
    monkeypatch.setattr(backend, "compile_inner", lambda graph, *_: graph.forward)
    for name in ("COLUMNS", "NO_COLOR", "TERMINAL_WIDTH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "screen-256color")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")

    def tmux(*words: str) -> str:
        command = ["tmux", "-u", "-f", os.devnull, "-S", str(tmp_path / "tmux"), *words]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout

    def shown(*words: str) -> str:
        tmux("new-session", "-d", "-x", "80", "-y", "500", "cat")
        with open(tmux("display-message", "-p", "#{pane_tty}").strip(), "r+b", 0) as terminal:
            _in_terminal(terminal.fileno(), words)
            os.write(terminal.fileno(), f"\r\n{END}\r\n".encode())
            ends = time.monotonic() + 30
            while END not in (text := tmux("capture-pane", "-p", "-J")):
                assert time.monotonic() < ends
                time.sleep(0.05)
        tmux("kill-server")
        return text[: text.index(END)].strip()

    return shown


def _in_terminal(terminal: int, words: tuple[str, ...]) -> None:
    """Run a command of the app in a terminal."""
    kept = [os.dup(number) for number in range(2)]  # of which rich asks the width
    try:
        for number in range(2):
            os.dup2(terminal, number)
        with (
            os.fdopen(os.dup(terminal), "w", encoding="utf-8") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            pytest.raises(SystemExit) as ended,
        ):
            app(list(words))
    finally:
        for number, copied in enumerate(kept):
            os.dup2(copied, number)
            os.close(copied)
    assert not ended.value.code, words


COMMANDS = {
    "explain": (["--model", "{model}", "--rank", "4", "--tune", "model"], "(1) quantised here"),
    "train": (
        ["--config", "{adapter}/run/run.yaml", "--output", "new", "--steps", "1"],
        "sites fused",
    ),
    "preview": (["--config", "{adapter}/run/run.yaml", "--preview", "1"], "assistant"),
    "eval": (["--adapter", "{adapter}/run", "--data", "{chats}", "--rows", "2"], "perplexity"),
    "chat": (["--adapter", "{adapter}/run", "--prompt", "say it", "--max-tokens", "4"], "> say it"),
    "merge": (["--adapter", "{adapter}/run", "--output", "new", "--data", "{chats}"], "distance"),
    "verify": (["--adapter", "{adapter}/run", "--data", "{chats}"], "allowed"),
    "records": (["list"], "no records in"),
}
"""By name: the rest of the command, and what the command prints."""

PLAIN = ("train", "preview", "eval", "chat")
"""Commands that print the same about a model that is not compiled."""


def lora_model(model: Any, lora: Any) -> Any:
    return model if lora is None else peft.get_peft_model(model, lora)


@pytest.mark.parametrize("name", COMMANDS)
def test_output_is_whole_in_80_columns(
    name: str, run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = COMMANDS[name]
    if name in PLAIN:
        monkeypatch.setattr(api, "optimize", lambda m, lora=None, **_: lora_model(m, lora))
        monkeypatch.setattr(api, "explain", lambda model: Report(()))
    monkeypatch.chdir(tmp_path)  # a short path for what is written
    places = {"adapter": adapter, "model": adapter / "model", "chats": adapter / "chat.jsonl"}
    words = [each.format(**places) for each in given]
    text = run("train" if name == "preview" else name, *words)
    assert expected in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80, text
