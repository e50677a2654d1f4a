"""What the benchmarks read of a device, and what packing while loading takes there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.gpu_memory import on_gpu
from qlora_compile import QloraCompileConfig
from tests.toy_models import toy

pytestmark = pytest.mark.gpu


def test_bytes_and_kernels_of_a_run() -> None:
    size = 1 << 22
    kept = torch.ones(size, dtype=torch.uint8, device="cuda")

    def run() -> torch.Tensor:
        return kept + 1 + 1

    run()
    before = torch.cuda.memory_allocated()
    found = on_gpu(run)
    assert (found.held, found.kernels) == (size, 2)
    assert found.most - before == 2 * size


@pytest.mark.parametrize("stored", ["plain", "packed"])
def test_the_peak_of_loading_is_the_packed_model_and_one_tensor(
    stored: str, tmp_path: Path
) -> None:
    # Its embeddings are the largest tensor, as those of real models.
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    plain = toy(dtype=torch.bfloat16, vocab_size=8192, **sizes)
    plain.save_pretrained(tmp_path, max_shard_size="8MB")
    largest, folder = max(parameter.nbytes for parameter in plain.parameters()), tmp_path
    options: dict[str, Any] = {"quantization_config": QloraCompileConfig("int8")}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", **options)
    if stored == "packed":
        folder, options = tmp_path / "packed", {}
        model.save_pretrained(folder)
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    packed = sum(tensor.nbytes for tensor in model.state_dict().values())
    del model
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", **options)
    peak = torch.cuda.max_memory_allocated() - before
    assert packed <= peak <= 1.1 * (packed + largest)
    del model
