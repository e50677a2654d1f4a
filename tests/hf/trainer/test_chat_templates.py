"""Chat templates: training ones render the same text, and mark the answers with their end."""

import itertools
from typing import Any

import pytest
from trl.chat_template_utils import is_chat_template_stop_token_trained

from qlora_compile.data_errors import ChatTemplateError
from qlora_compile.hf.trainer.chat_templates import TRAINING_TEMPLATES, training_template
from tests.toy_language_model import chat_tokenizer, toy_tokenizer


@pytest.mark.parametrize(("plain", "marked"), TRAINING_TEMPLATES)
def test_a_training_template_renders_the_same_and_marks_answers(plain: str, marked: str) -> None:
    tokenizer = chat_tokenizer()
    for roles in itertools.product(("system", "user", "assistant"), repeat=3):
        chat = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
        for prompt in (False, True):
            texts = [
                tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=prompt
                )
                for template in (plain, marked)
            ]
            assert texts[0] == texts[1]
        tokens: Any = tokenizer.apply_chat_template(
            chat, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        pairs = zip(tokens["input_ids"], tokens["assistant_masks"], strict=True)
        learnt = tokenizer.decode([token for token, mask in pairs if mask])
        end = tokenizer.eos_token
        answers = (f"{turn['content']}{end}" for turn in chat if turn["role"] == "assistant")
        assert learnt == "".join(answers)
    assert is_chat_template_stop_token_trained(tokenizer, marked)


def test_the_demo_s_model_has_the_template_that_is_known() -> None:
    gguf: Any = pytest.importorskip("gguf")
    from qlora_compile.training.demo import demo_model_file

    field = gguf.GGUFReader(demo_model_file()).get_field("tokenizer.chat_template")
    assert field.contents() in [plain for plain, _ in TRAINING_TEMPLATES]


def test_a_template_with_markers_or_of_trl_s_is_taken() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TRAINING_TEMPLATES[0][1]
    assert training_template(tokenizer, "x") == TRAINING_TEMPLATES[0][1]
    from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

    tokenizer.chat_template = qwen3_chat_template
    assert training_template(tokenizer, "x") == qwen3_training_chat_template


def test_an_unknown_template_is_one_error_with_the_remedy() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(
        ChatTemplateError, match=r"chat.jsonl .* does not mark .* assistant_only_loss"
    ):
        training_template(tokenizer, "chat.jsonl")
    with pytest.raises(ChatTemplateError, match="no chat template; take the instruct variant"):
        training_template(toy_tokenizer(), "chat.jsonl")
