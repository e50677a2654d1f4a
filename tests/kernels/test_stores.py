"""When decoded weights are written past the caches."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from qlora_compile.kernels.cpu import instructions, stores
from qlora_compile.kernels.formats.cpu import decode
from qlora_compile.kernels.registry import VARIANTS
from tests.kernels.linear_cases import BF16, Case, Dtypes

SMALL = torch.empty(64, 64, dtype=torch.bfloat16)
LARGE = torch.empty(2049, 1024, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("rows", "threads", "level", "past"),
    [
        (256, 2, "avx512_bf16", True),
        (256, 2, "avx2", True),
        (255, 2, "avx512_bf16", False),
        (256, 1, "avx512_bf16", False),
        (256, 2, "amx", False),
    ],
)
def test_products_of_many_rows_read_from_memory(
    rows: int, threads: int, level: str, past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(instructions, "level", lambda: level)
    assert list(stores.read_by(rows, map(stores.past_caches, (SMALL, LARGE)))) == [past, True]
    assert list(stores.read_by(rows, map(stores.past_caches, [LARGE.float()]))) == [False]
    assert not stores.past_caches(SMALL)  # Nothing is known of the product any more.


def test_a_product_that_fails_is_forgotten() -> None:
    def fails() -> Iterator[None]:
        raise RuntimeError
        yield

    with pytest.raises(RuntimeError):
        next(stores.read_by(256, fails()))
    assert stores._products.rows == 0


def test_the_baseline_tells_the_rows_of_its_products() -> None:
    seen = []

    def past_caches(out: torch.Tensor) -> bool:
        seen.append(stores._products.rows)
        return False

    call = Case((3, 90), n=64, k=64, dtypes=Dtypes(*[BF16] * 5)).build()
    with (
        mock.patch.object(decode, "past_caches", past_caches),
        mock.patch.object(decode, "SMALLEST", 1),
    ):
        call.fused(VARIANTS[0])
    assert seen
    assert set(seen) == {270}
