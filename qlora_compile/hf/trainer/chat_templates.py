"""Chat templates for training: which tokens of a rendered chat the assistant wrote.

transformers reads that from `{% generation %}` markers. TRL knows such templates for many models;
those that TRL lacks stand here, each beside the template that it renders the same text as.
"""

from __future__ import annotations

from typing import Any

from qlora_compile.data_errors import ChatTemplateError

_SMOLLM2_START = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
)
_SMOLLM2_END = (
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    f"{_SMOLLM2_START}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    f"{_SMOLLM2_END}"
)
SMOLLM2_TRAINING = (
    f"{_SMOLLM2_START}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    f"{_SMOLLM2_END}"
)

TRAINING_TEMPLATES = ((SMOLLM2, SMOLLM2_TRAINING),)
"""A model's template, and the one with markers around each answer and the token that ends it."""


def require_template(tokenizer: Any, site: str) -> str:
    """Return the tokenizer's chat template.

    Raises:
        ChatTemplateError: it has none.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            site=site,
            problem="the tokenizer has no chat template",
            remedy="take the instruct variant of the model, or set chat_template_path to the file "
            "of a template",
        )
    return tokenizer.get_chat_template()


def training_template(tokenizer: Any, site: str) -> str:
    """Return the tokenizer's chat template with generation markers.

    Raises:
        ChatTemplateError: it has none, or an unknown one without markers.
    """
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    template = require_template(tokenizer, site)
    if has_generation_markers(template):
        return template
    for plain, marked in TRAINING_TEMPLATES:
        if plain == template:
            return marked
    try:
        return get_training_chat_template(tokenizer) or template
    except ValueError as error:
        raise ChatTemplateError(
            site=site,
            problem="the tokenizer's template does not mark what the assistant wrote",
            remedy="set chat_template_path to a file with the same template and {% generation %} "
            "… {% endgeneration %} around each answer and its end token, or "
            "assistant_only_loss=False to train on all turns",
        ) from error
