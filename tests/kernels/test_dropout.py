"""The counter-based dropout mask against Philox in plain integers."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_compile.kernels import dropout
from qlora_compile.kernels.dropout import ROUNDS, dropout_threshold, keep_mask, philox4x32

WORD = 2**32
SEEDS = st.integers(0, 2**62)
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PI_KEY = 0xA4093822 | 0x299F31D0 << 32

# kat_vectors of Random123 (Salmon et al. 2011), 10 rounds.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
)


def philox_of_integers(words: tuple[int, ...], key: int, rounds: int) -> tuple[int, ...]:
    key0, key1 = key % WORD, key // WORD % WORD
    for _ in range(rounds):
        high0, low0 = divmod(words[0] * 0xD2511F53, WORD)
        high1, low1 = divmod(words[2] * 0xCD9E8D57, WORD)
        words = (high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0)
        key0, key1 = (key0 + 0x9E3779B9) % WORD, (key1 + 0xBB67AE85) % WORD
    return words


def kept_by_integers(seed: int, stream: int, probability: float, element: int) -> bool:
    counter, lane = divmod(element, 8)
    words = philox_of_integers((counter % WORD, counter // WORD, stream, 0), seed, 7)
    return words[lane // 2] >> 16 * (lane % 2) & 0xFFFF >= round(probability * 65536)


@pytest.mark.parametrize(("words", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(words: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    assert philox_of_integers(words, key, 10) == expected
    as_integers = philox4x32(words, key, 10)
    assert tuple(int(word) % WORD for word in as_integers) == expected
    counters = [torch.tensor([word, 0, word]) for word in words]
    lanes = philox4x32(counters, key, 10)
    last = [word[2] if isinstance(word, torch.Tensor) else word for word in lanes]
    assert tuple(int(word) % WORD for word in last) == expected


@given(
    words=st.tuples(*[st.integers(0, WORD - 1)] * 4),
    tensors=st.tuples(*[st.booleans()] * 4),
    key=st.integers(0, 2**63 - 1),
    key_is_tensor=st.booleans(),
    rounds=st.sampled_from([1, 2, 3, ROUNDS, 10]),
)
@settings(max_examples=150)
def test_philox_of_tensors_and_integers(
    words: tuple[int, ...], tensors: tuple[bool, ...], key: int, key_is_tensor: bool, rounds: int
) -> None:
    mixed = [torch.tensor([w, w]) if t else w for w, t in zip(words, tensors, strict=True)]
    result = philox4x32(mixed, torch.tensor([key]).expand(2) if key_is_tensor else key, rounds)
    expected = philox_of_integers(words, key, rounds)
    for word, value in zip(result, expected, strict=True):
        values = word.tolist() if isinstance(word, torch.Tensor) else [word]
        assert {each % WORD for each in values} == {value}


@given(
    seed=SEEDS,
    stream=st.integers(0, WORD - 1),
    probability=st.floats(0.0, 1.0, exclude_max=True),
    start=st.one_of(st.integers(0, 40), st.integers(2**33, 2**36)),
    rows=st.integers(0, 9),
    k=st.integers(1, 21),
)
def test_mask_equals_integers(
    seed: int, stream: int, probability: float, start: int, rows: int, k: int
) -> None:
    mask = keep_mask(torch.tensor([seed]), stream, probability, (start, start + rows), k)
    assert mask.dtype == torch.bool
    expected = [
        [kept_by_integers(seed, stream, probability, row * k + column) for column in range(k)]
        for row in range(start, start + rows)
    ]
    assert mask.tolist() == expected


def test_mask_across_the_carry_into_the_second_word() -> None:
    k = 24
    row = 8 * WORD // k
    mask = keep_mask(torch.tensor([77]), 5, 0.5, (row - 1, row + 2), k)
    expected = [kept_by_integers(77, 5, 0.5, (row - 1) * k + each) for each in range(3 * k)]
    assert mask.flatten().tolist() == expected


@given(
    cuts=st.sets(st.integers(1, 39), max_size=6),
    k=st.sampled_from([1, 3, 8, 20, 33]),
    chunk=st.sampled_from([1, 2, 7, dropout._CHUNK]),
)
@settings(max_examples=40)
def test_any_split_of_rows_gives_the_same_mask(cuts: set[int], k: int, chunk: int) -> None:
    seed = torch.tensor([2**61 + 17])
    whole = keep_mask(seed, 1, 0.3, (0, 40), k)
    bounds = [0, *sorted(cuts), 40]
    with mock.patch.object(dropout, "_CHUNK", chunk):
        parts = [keep_mask(seed, 1, 0.3, rows, k) for rows in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_independence(probability: float) -> None:
    rows, k = 512, 512
    masks = [
        keep_mask(torch.tensor([seed]), stream, probability, (0, rows), k).double()
        for seed, stream in ((0, 0), (0, 1), (1, 0), (2**32, 0))
    ]
    deviation = (probability * (1 - probability)) ** 0.5
    standardized = [(mask - (1 - probability)) / deviation for mask in masks]
    limit = 6 / (rows * k) ** 0.5
    for index, mask in enumerate(standardized):
        assert mask.mean().abs() < limit
        assert mask.mean(0).abs().max() < 6 / rows**0.5
        assert mask.mean(1).abs().max() < 6 / k**0.5
        flat = mask.flatten()
        for lag in (1, 2, 4, 7, 8, k):
            assert (flat[lag:] * flat[:-lag]).mean().abs() < 1.1 * limit, lag
        for other in standardized[:index]:
            assert (mask * other).mean().abs() < limit


@pytest.mark.parametrize("probability", [0.0, 0.3, 1 - 2**-16, 1 - 2**-40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_mask_in_other_dtypes(probability: float, dtype: torch.dtype) -> None:
    arguments = (torch.tensor([3]), 0, probability, (3, 70), 129)
    mask = keep_mask(*arguments)
    as_numbers = keep_mask(*arguments, dtype)
    assert as_numbers.dtype == dtype
    assert as_numbers.is_contiguous()
    assert torch.equal(as_numbers, mask.to(dtype))


def test_probabilities_at_the_ends() -> None:
    seed = torch.tensor([3])
    assert keep_mask(seed, 0, 0.0, (0, 64), 100).all()
    # Half of a lane's resolution from 1: nothing is kept.
    assert not keep_mask(seed, 0, 1 - 2**-18, (0, 640), 100).any()
    # One lane value in 65536 is kept.
    assert 0 < keep_mask(seed, 0, 1 - 2**-16, (0, 6400), 100).sum() < 40
    assert (dropout_threshold(0.0), dropout_threshold(0.5)) == (0, 32768)
