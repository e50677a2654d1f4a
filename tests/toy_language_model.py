"""A language model, a classifier and a tokenizer small enough to build for every test."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from qlora_compile.hf.trainer.chat_templates import SMOLLM2

END = "<|end|>"
VOCABULARY = 128
LONGEST = 64


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return one token per ASCII character, and an end of text."""
    printable = [symbol for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()) if symbol <= "~"]
    space, newline = "\u0120", "\u010a"  # how the byte-level alphabet writes them
    symbols = [*printable, space, newline, END]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=END
    )


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Return the toy tokenizer with SmolLM2's chat template and that template's two tokens."""
    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}  # pyright: ignore[reportArgumentType]
    )
    tokenizer.chat_template = SMOLLM2
    return tokenizer


def toy_llama(seed: int = 0, longest: int = LONGEST) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=longest,
            tie_word_embeddings=True,
        )
    )


def toy_bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
        )
    )
