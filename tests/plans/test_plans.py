"""The properties of plans on an imaginary device; plans_found.py and parity_found.py run them, each
in a separate process."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_compile.kernels.gpu.ahead_of_time import TARGETS
from qlora_compile.kernels.gpu.launch import Launch
from qlora_compile.kernels.gpu.launch_step import launch_step
from qlora_compile.kernels.plans import first_use, native
from qlora_compile.kernels.plans.recording import Recorder
from qlora_compile.kernels.plans.slab import ALIGNMENT, Piece, packed
from qlora_compile.kernels.plans.steps import Source, UnplannableError
from tests.bench.compiled import run
from tests.examples import LONG

Found = dict[str, Any]


def _found(module: str, *arguments: str) -> Found:
    done = run(module, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Found:
    return _found("tests.plans.plans_found")


@pytest.fixture(scope="module")
def parity() -> Found:
    return _found("tests.plans.parity_found", "sm_90", *(["all"] if LONG else []))


def test_launches_are_those_of_tritons_own_launcher(parity: Found) -> None:
    assert not {call: differences for call, differences in parity.items() if differences}
    kinds = ("forward tail", "backward tail", "forward fused", "experts", "experts' backward")
    for kind in kinds:
        assert any(call.startswith(kind) for call in parity)


def test_torchs_operators_replay_to_the_same_bits(found: Found) -> None:
    assert found["operators"]["equal"] == [True] * 4
    assert found["operators"]["plans"] == 1
    # Python's own scratch memory is freed once there is a plan.
    assert found["operators"]["workspaces"] == 0


def test_integers_replay_as_integers(found: Found) -> None:
    assert found["integers"] == {"equal": [True] * 4, "plans": 1, "report": []}


def test_recording_needs_no_more_memory_than_python(found: Found) -> None:
    # What is shared is freed before; what does not fit all the same is computed without a plan.
    short = found["short_of_memory"]
    assert short["shapes"] == [[6, 24]] * 5
    assert short["kept"] == [0]
    assert short["plans"] == 0
    assert ["no room" in line for line in short["report"]] == [True]


def test_results_have_contiguous_storage_of_their_own(found: Found) -> None:
    results = found["results"]
    assert results["bytes"] == [6 * 24 * 4] * 3
    assert results["apart"] == 3
    assert results["shape"] == [2, 3, 24]
    assert results["contiguous"]


def test_the_profiler_shows_the_op(found: Found) -> None:
    assert found["results"]["profiled"] == ["qlora_compile::qlora_linear"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("read", "aten.item.default returns a value"),
        ("drawn", "aten.rand.default gives other values"),
        ("viewed", "without a contiguous storage of its own"),
        ("listed", "aten._foreach_add_"),
        ("hidden", "the replay gave other bits"),
    ],
)
def test_what_cannot_be_replayed_stays_right_and_is_reported(
    found: Found, body: str, reason: str
) -> None:
    right, plans, report, warned = found["refused"][body]
    assert right == [True] * 4
    assert plans == 0
    (line,) = report
    assert line.startswith("Python starts the kernels of qlora_linear of [6, 16] and plain")
    assert reason in line
    assert len(warned) == (body == "hidden")


def test_a_launch_that_fails_names_kernel_and_call(found: Found) -> None:
    failing = found["failing"]
    for error, number in (("RuntimeError", 719), ("OutOfMemoryError", 2)):
        assert failing[error].startswith(f"CUDA error {number}")
        assert "kernel copying_kernel of qlora_linear of [6, 16]" in failing[error]
    assert failing["after"] == [6, 24]


def test_nothing_is_recorded_while_a_stream_is_captured(found: Found) -> None:
    assert found["captured"] == {"during": 0, "after": 1, "launched": 2}


def test_ragged_batches_record_what_comes_back_and_hold_bounded_memory(found: Found) -> None:
    ragged = found["ragged"]
    assert ragged["once"] == [0, 200]
    # More keys in turn than there is room for: none comes back in time, none is recorded.
    assert ragged["cycled"] == [0, 16, 3 * 32 * 2]
    assert ragged["kept"] == [8, 16]


def test_a_plan_is_for_a_key(found: Found) -> None:
    keyed = found["keyed"]
    ways = ("plain", "again", "strides", "alignment", "settings", "batch")
    assert [keyed[way] for way in ways] == [1, 1, 2, 3, 4, 5]
    assert keyed["a new selector"] == 0
    assert keyed["other choices"] == [1, 0]


def test_threads_look_up_record_and_evict_at_once(found: Found) -> None:
    assert found["threaded"]["wrong"] == []
    assert found["threaded"]["stuck"] == [False, False]


def test_threads_run_backwards_at_once(found: Found) -> None:
    differentiated = found["differentiated"]
    assert differentiated["errors"] == differentiated["wrong"] == []
    assert differentiated["stuck"] == [False, False]
    # Of a dozen keys in both directions there is room for five.
    assert differentiated["keys"] == 5
    assert differentiated["plans"] >= 2


def test_transforms_of_torch_func_make_and_use_no_plans(found: Found) -> None:
    transformed = found["transformed"]
    assert transformed["before"][0] == 1
    assert transformed["after"] == transformed["before"]
    assert transformed["gradient"]
    assert transformed["mapped"]


def test_python_runs_while_a_plan_launches(found: Found) -> None:
    # Two launches of 100 ms, in ticks of a few ms.
    assert found["threaded"]["ticks"] >= 10


def test_fakes_traces_and_subclasses_see_the_op(found: Found) -> None:
    elsewhere = found["elsewhere"]
    assert elsewhere["fake"] == "FakeTensor"
    assert elsewhere["targets"][0] == "qlora_compile.qlora_linear.default"
    assert elsewhere["subclass"] == "TwoTensor"
    assert elsewhere["differentiable"]


def test_plans_can_be_off_and_give_way_to_launch_hooks(found: Found) -> None:
    assert found["elsewhere"]["by python"] == [0, 2]
    # Two launches are told of while the hook is there, none afterwards.
    assert found["elsewhere"]["hooked"] == [2, 2]


def test_plans_keep_their_kernels_loaded(found: Found) -> None:
    assert found["living"]["alive"]
    assert all(found["living"]["alive"])
    assert found["living"]["launched"] == 2


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a machine with a GPU, before anything is built; the keys that are installed."""
    installed: list[str] = []
    monkeypatch.setattr(native, "_state", native._State())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "_load", lambda: None)
    monkeypatch.setattr(native, "install", installed.append)
    return installed


def test_without_a_compiler_the_report_says_so(
    on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "has_compiler", lambda: False)
    assert native.report() == []
    native.start()
    native.start()
    native.heed()
    (line,) = native.report()
    assert "no C++ compiler" in line
    assert on_a_gpu == []


def test_what_is_built_is_installed_before_a_block_but_in_no_backward(on_a_gpu: list[str]) -> None:
    native.heed()
    native.start()
    for thread in threading.enumerate():
        if thread.name == "plans":
            thread.join()

    class Heeding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            native.heed()
            assert on_a_gpu == []
            return grad

    Heeding.apply(torch.ones(1, requires_grad=True)).backward()
    native.heed()
    assert on_a_gpu == ["CUDA"]


def test_there_are_no_plans_on_rocm(on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    native.start()
    native.heed()
    (line,) = native.report()
    assert line.startswith("Python starts all kernels")
    assert "ROCm" in line
    assert on_a_gpu == []


def test_nothing_is_compared_under_a_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    fraction = iter([0.5, 1.0, 1.0])
    known = {"memory_reserved": 30, "memory_allocated": 20, "mem_get_info": (90, 200)}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(
        torch.cuda, "get_per_process_memory_fraction", lambda device: next(fraction)
    )
    assert [first_use._fits(device, size) for size in (1, 100, 101)] == [False, True, False]


def test_what_uses_a_second_stream_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder([torch.zeros(1)])
    monkeypatch.setattr(recorder, "_current_stream", lambda: 1)
    recorder.launched(_LAUNCH, _Compiled())
    assert recorder.obstacle == "it uses a second stream"
    assert not recorder.steps


class _Compiled:
    function = 1
    src = SimpleNamespace(signature={"x": "*fp32", "n": "i32"})

    def __init__(self, **metadata: Any) -> None:
        plain = {
            "name": "toy",
            "shared": 0,
            "warp_size": 32,
            "num_warps": 4,
            "target": TARGETS["sm_90"],
        }
        self.metadata = SimpleNamespace(**plain | metadata)


_LAUNCH = Launch(None, (1,), {"x": torch.zeros(1), "n": -1}, {})


def _step(compiled: _Compiled) -> Any:
    return launch_step(_LAUNCH, compiled, lambda tensor: (Source("input", 0), 0))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"num_ctas": 2}, "clusters"),
        ({"global_scratch_size": 16}, "scratch"),
        ({"profile_scratch_size": 16}, "profiling"),
        ({"launch_cooperative_grid": True}, "cooperative"),
        ({"launch_pdl": True}, "programmatic"),
        ({"shared": 229 * 1024}, "bytes of shared memory"),
        ({"target": TARGETS["gfx942"]}, "of hip"),
    ],
)
def test_kernels_that_need_more_than_a_launch_are_left_to_triton(
    metadata: Found, reason: str
) -> None:
    with pytest.raises(UnplannableError, match=f"toy .*{reason}"):
        _step(_Compiled(**metadata))


def test_parameters_in_the_kernels_order() -> None:
    step = _step(_Compiled())
    assert step.names == ("toy",)
    pointer, number, nothing = [1, 8, Source("input", 0), 0], [0, 4, -1], [0, 8, 0]
    assert step.numbers == [1, 1, 1, 1, 128, 0, 4, *pointer, *number, *nothing, *nothing]


_pieces = st.lists(
    st.builds(
        lambda size, first, length: Piece(size, first, first + length),
        st.integers(0, 2000), st.integers(0, 8), st.integers(0, 4),
    ),
    max_size=12,
)  # fmt: skip


@given(_pieces)
def test_pieces_that_are_needed_at_once_lie_apart(pieces: list[Piece]) -> None:
    offsets, size = packed(pieces)
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    for i, (one, start) in enumerate(zip(pieces, offsets, strict=True)):
        assert 0 <= start <= start + one.size <= size
        for other, begin in zip(pieces[:i], offsets[:i], strict=True):
            if one.size and other.size and one.first <= other.last and other.first <= one.last:
                assert start + one.size <= begin or begin + other.size <= start
    assert size <= sum(-(-piece.size // ALIGNMENT) * ALIGNMENT for piece in pieces)


def test_a_piece_takes_the_place_of_one_that_is_not_needed_any_more() -> None:
    assert packed([Piece(1000, 0, 1), Piece(1000, 2, 3), Piece(8, 1, 2)]) == ([0, 0, 1024], 1032)
