"""The fake device records what Triton's own launcher does, and does what it is told."""

import json
from typing import Any

import pytest

from tests.bench.compiled import run


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = run("tests.fake_device.launches_found")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_launch_is_noted_with_the_bytes_of_its_parameters(found: dict[str, Any]) -> None:
    assert found["kernel"] == "toy_kernel"
    assert (found["grid"], found["block"]) == ([3, 1, 1], [64, 1, 1])
    # The map with its shape and strides, the pair, out, count, factor, Triton's two of its own.
    assert found["sizes"] == [128, 4, 4, 8, 8, 8, 4, 8, 4, 4, 8, 8]
    assert found["map"]
    assert found["pointers"] == [True, True]
    assert found["numbers"]
    assert found["same"]


def test_nothing_is_noted_outside_of_a_recording_and_nothing_runs(found: dict[str, Any]) -> None:
    assert found["none"] == 0
    assert found["launched"] == 6
    assert found["loaded"] == 1
    assert not found["written"]


def test_launches_are_charged_and_fail_when_asked(found: dict[str, Any]) -> None:
    assert found["charged"] >= 1e-3
    assert "not there" in found["error"]
