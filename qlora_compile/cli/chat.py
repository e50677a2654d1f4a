"""The command line's `chat`: talks with a model through a trained adapter."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qlora_compile.cli.bad_input import bad_input_in_one_line
from qlora_compile.cli.options import AdapterFormatOption, AdapterModelOption, AdapterOption
from qlora_compile.training.model_choice import be_quiet

PROMPT = "> "


def chat(
    adapter: AdapterOption,
    model: AdapterModelOption = None,
    format: AdapterFormatOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Ask this, then end. May be repeated.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Answer without the adapter.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of one answer.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 for the most probable words.")
    ] = 0.0,
) -> None:
    """Chat with a trained adapter; answers appear as they are written. An empty line ends it."""
    with bad_input_in_one_line():
        from qlora_compile.training.adapted import adapted_model, adapter_settings

        settings = adapter_settings(adapter, model, format)
        be_quiet()
        from qlora_compile.hf.generation import streamed
        from qlora_compile.hf.training import quiet

        quiet()
        trained, tokenizer = adapted_model(adapter, settings)
        options: dict[str, Any] = {"max_new_tokens": max_tokens}
        if temperature:
            options |= {"do_sample": True, "temperature": temperature}
        turns: list[dict[str, str]] = []
        for question in prompt or iter(_asked, ""):
            if prompt:
                typer.echo(f"{PROMPT}{question}")
            turns.append({"role": "user", "content": question})
            answer = streamed(trained, tokenizer, turns, without_adapter=base, **options)
            turns.append({"role": "assistant", "content": answer})


def _asked() -> str:
    try:
        return input(PROMPT).strip()
    except (EOFError, KeyboardInterrupt):
        return ""
