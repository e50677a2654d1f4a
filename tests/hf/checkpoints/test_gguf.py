"""GGUF files keep their blocks where a format holds them, and equal what transformers decodes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import qlora_compile
from bench.coverage.shrink import shrunk
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.hf.checkpoints.gguf import GgufFile
from qlora_compile.modules.linear import QuantizedLinear
from tests.toy_models import VOCABULARY, toy

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
    assert assert_equal(model, expected) == 12


def assert_equal(model: Any, expected: dict[str, Tensor]) -> int:
    """Compare a model with the weights that transformers decodes; return how many are packed."""
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, module in packed.items():
        assert torch.equal(module.dequantize(torch.float32), expected[f"{name}.weight"]), name
        assert module.origin == "gguf checkpoint"
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, expected[name]), name
    return len(packed)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, toy("Llama"), {})
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"model\.gguf: .*cannot be read.*download"):
        qlora_compile.load(path, dtype=torch.float32)


FILES = {
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
}
"""llama.cpp's names of architectures, where they are not transformers'."""
TYPES = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
"""Model types, where they are not named after the architecture."""
ARCHITECTURES = [
    name
    for name in GGUF_CONFIG_MAPPING
    if TYPES.get(name, name) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    and FILES.get(name, name) in gguf.MODEL_ARCH_NAMES.values()
    and name not in GGUF_ARCHS
]


def begun(path: Path, architecture: str) -> gguf.GGUFWriter:
    """Return a writer of a toy model's settings, as transformers reads them."""
    config_class = CONFIG_MAPPING[TYPES.get(architecture, architecture)]
    # The padding token is not in the file, and has to be inside the vocabulary.
    tokens = max(VOCABULARY, 1 + (config_class().pad_token_id or 0))
    config = shrunk(config_class, vocab_size=tokens)
    name = FILES.get(architecture, architecture)
    writer = gguf.GGUFWriter(path, name)
    writer.add_token_list([str(number) for number in range(tokens)])
    for key, field in GGUF_CONFIG_MAPPING[architecture].items():
        value = getattr(config, field, None) if field else None
        if architecture == "lfm2" and field == "num_key_value_heads":  # in layers of attention
            value = [value * (kind == "full_attention") for kind in config.layer_types]
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_toy(path: Path, architecture: str) -> None:
    """Write a toy model of an architecture with random weights, in blocks where they fit."""
    finish(begun(path, architecture))
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    state, writer = model.state_dict(), begun(path, architecture)
    processor = TENSOR_PROCESSORS.get(FILES.get(architecture, architecture), TensorProcessor)()
    for name, place in get_gguf_hf_weights_map(model, processor).items():
        weight = state.get(place)
        if weight is None or name == "output.weight":
            continue
        module = model.get_submodule(place.rpartition(".")[0])
        if name.endswith("_exps"):
            half = weight.shape[1] // 2
            parts = {"gate": weight[:, :half], "up": weight[:, half:], "down": weight}
            weight, name = parts[name.rpartition(".")[2].split("_")[1]], f"{name}.weight"
        elif name.endswith("ssm_a"):
            weight = -weight.exp()
        elif isinstance(module, Conv1D) and weight.dim() == 2:
            weight = weight.t()
        elif weight.dim() > 1 and 1 in weight.shape:  # a convolution, or the gate of an expert
            weight = weight.squeeze()
        values = weight.detach().contiguous().numpy()
        fits = values.ndim == 2 and values.shape[1] % 32 == 0 and name.endswith(".weight")
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    finish(writer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_that_transformers_reads(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    write_toy(path, architecture)
    options: Any = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    options |= {"gguf_file": path.name, "output_loading_info": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    stock, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers fills them with random numbers
        with pytest.raises(CheckpointError, match=f"{missing[0]}: the tensor is missing"):
            qlora_compile.load(path, dtype=torch.float32)
        return
    model = qlora_compile.load(path, dtype=torch.float32)
    assert_equal(model, stock.state_dict())


@pytest.mark.parametrize("architecture", GGUF_ARCHS)
def test_what_transformers_reads_in_its_newer_way_is_left_to_it(
    tmp_path: Path, architecture: str
) -> None:
    path = tmp_path / "model.gguf"
    finish(gguf.GGUFWriter(path, architecture))
    assert not GgufFile(path, LlamaForCausalLM, LlamaConfig()).is_known


def test_orders_of_rows_are_found_without_copies_of_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = toy("Llama", num_hidden_layers=1, vocab_size=1 << 15)
    write(path, model, dict.fromkeys(("token_embd", "output"), "Q8_0"))
    tracemalloc.start()
    try:
        GgufFile(path, LlamaForCausalLM, model.config)
        assert tracemalloc.get_traced_memory()[1] < model.lm_head.weight.nbytes
    finally:
        tracemalloc.stop()
