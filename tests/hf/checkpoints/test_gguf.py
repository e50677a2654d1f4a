"""GGUF files keep their blocks where a format holds them, and equal what transformers decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from transformers import GgufConfig, LlamaForCausalLM

import qlora_compile
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.modules.linear import QuantizedLinear
from tests.toy_models import toy

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, model: Any, kinds: dict[str, str]) -> None:
    """Write a Llama in llama.cpp's order of rows. kinds: types of blocks, by llama.cpp's name."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "output": model.lm_head.weight,
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for i, layer in enumerate(model.model.layers):
        for path_in, name in NAMES.items():
            weight = layer.get_submodule(path_in).weight
            if name in heads:
                # The two halves of a head, which are rotated against one another, become pairs.
                halves = weight.reshape(heads[name], 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{i}.{name}"] = weight
    for name, weight in tensors.items():
        kind = gguf.GGMLQuantizationType[kinds.get(name.rpartition(".")[2], "F32")]
        values = weight.detach().contiguous().numpy()
        data = nonlinear(values.shape) if kind.name == "IQ4_NL" else gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def nonlinear(shape: tuple[int, int]) -> Any:
    """Return random blocks of IQ4_NL, which gguf cannot make: a scale and 16 bytes per 32
    weights."""
    generator = numpy.random.default_rng(0)
    blocks = generator.integers(0, 256, (shape[0], shape[1] // 32, 18), dtype=numpy.uint8)
    blocks[:, :, :2] = numpy.full(1, 0.01, dtype=numpy.float16).view(numpy.uint8)
    return blocks.reshape(shape[0], -1)


def stock(path: Path) -> Any:
    options: Any = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_every_weight_equals_what_transformers_decodes(tmp_path: Path, kind: str) -> None:
    """In the order of rows that transformers gives them; another type is decoded, and named."""
    path = tmp_path / "model.gguf"
    kinds = dict.fromkeys(NAMES.values(), kind) | {"ffn_up": "IQ4_NL", "token_embd": kind}
    kinds |= dict.fromkeys(("attn_norm", "ffn_norm"), "F32")
    write(path, toy("Llama"), kinds)
    expected = stock(path).state_dict()
    with pytest.warns(UserWarning, match=r"2 of IQ4_NL: .*decoded"):
        model = qlora_compile.load(path, dtype=torch.float32)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 12
    for name, module in packed.items():
        assert torch.equal(module.dequantize(torch.float32), expected[f"{name}.weight"]), name
        assert module.origin == "gguf checkpoint"
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, expected[name]), name


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, toy("Llama"), {})
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model\.gguf: .*cannot be read.*download"):
        qlora_compile.load(path, dtype=torch.float32)
