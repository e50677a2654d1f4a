"""What the cost model knows of a device: figures from data sheets, a model and no measurement."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceModel:
    """A GPU. target: as of `target_of`. flops: dense 16-bit tensor-core operations per second with
    float32 accumulation. bandwidth: bytes per second of the memory. vendor_efficiency: the part of
    `flops` that the vendor's GEMM reaches on large problems. sms: the number of multiprocessors."""

    name: str
    target: str
    flops: float
    bandwidth: float
    vendor_efficiency: float
    sms: int

    def gemm_seconds(self, m: int, n: int, k: int, efficiency: float) -> float:
        """Return the seconds of a product [M, K] x [K, N] that reads its operands from memory
        once."""
        moved = 2 * (m * k + n * k + m * n)
        # Tensor cores work on no fewer than sixteen rows.
        return max(2 * max(m, 16) * n * k / (self.flops * efficiency), self.stream_seconds(moved))

    def stream_seconds(self, moved: float) -> float:
        """Return the seconds of moving so many bytes at the usual part of the memory's
        bandwidth."""
        return moved / (0.92 * self.bandwidth)


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CpuModel(DeviceModel):
    """Torch's operators on a CPU's threads; each tuple is for float64, float32, bfloat16 and
    float16. gemm: operations per second of large products. thin: the same of products with a
    dimension of sixteen. decode: seconds per weight. operator: seconds of starting an operator.
    dropout: seconds per element of a mask."""

    gemm: tuple[float, ...]
    thin: tuple[float, ...]
    decode: tuple[float, ...]
    operator: float
    dropout: float

    @classmethod
    def from_json(cls, figures: Mapping[str, Any]) -> CpuModel:
        """Return the model that `dataclasses.asdict` and JSON have written; raise TypeError for
        other fields."""
        parts: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in figures.items()
        }
        return cls(**parts)

    def of(self, figures: tuple[float, ...], dtype: torch.dtype) -> float:
        """Return the figure for `dtype`."""
        return figures[_DTYPES.index(dtype)]

    def move_seconds(self, moved: float) -> float:
        """Return the seconds of an operator that moves so many bytes."""
        return moved / self.bandwidth + self.operator


LAUNCH_SECONDS = 4e-6
"""The seconds that starting one of many kernels takes."""

DEVICE_MODELS = (
    DeviceModel("A100", "sm_80", 312e12, 2.04e12, 0.80, 108),
    DeviceModel("A10", "sm_86", 125e12, 0.60e12, 0.85, 72),
    DeviceModel("RTX 3090", "sm_86", 71e12, 0.94e12, 0.92, 82),
    DeviceModel("RTX 4090", "sm_89", 165e12, 1.01e12, 0.92, 128),
    DeviceModel("L40", "sm_89", 181e12, 0.86e12, 0.85, 142),
    DeviceModel("L4", "sm_89", 121e12, 0.30e12, 0.60, 58),
    DeviceModel("H200", "sm_90", 989e12, 4.80e12, 0.72, 132),
    DeviceModel("H100", "sm_90", 989e12, 3.35e12, 0.70, 132),
    DeviceModel("B200", "sm_100", 2250e12, 8.00e12, 0.72, 148),
    DeviceModel("RTX 5090", "sm_120", 210e12, 1.79e12, 0.92, 170),
    DeviceModel("MI300X", "gfx942", 1307e12, 5.30e12, 0.50, 304),
    DeviceModel("MI350", "gfx950", 2300e12, 8.00e12, 0.50, 256),
)

CPU = CpuModel(
    name="cpu",
    target="cpu",
    flops=1e12,
    bandwidth=1.5e10,
    vendor_efficiency=1.0,
    sms=1,
    gemm=(6e10, 1.2e11, 2.4e11, 2e10),
    thin=(2e10, 4e10, 5e10, 1e10),
    decode=(1.5e-9, 0.8e-9, 1.0e-9, 1.5e-9),
    operator=1e-5,
    dropout=5e-10,
)
"""A guess at a few cores, where the CPU has not been measured."""


@functools.cache
def device_model(device: str, target: str) -> DeviceModel:
    """Return the card's model, or that of another card of its target, or of the nearest
    generation."""
    # A device that is only assumed has no name.
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    for model in DEVICE_MODELS:
        if model.name in name:
            return model
    return model_of_target(target)


def model_of_target(target: str) -> DeviceModel:
    """Return the first card listed for `target`, else for the nearest generation of the same
    vendor."""
    vendor, number = target[:3], int(target.lstrip("smgfx_"), 16)

    def distance(model: DeviceModel) -> tuple[bool, int]:
        return model.target[:3] != vendor, abs(int(model.target.lstrip("smgfx_"), 16) - number)

    return min(DEVICE_MODELS, key=distance)
