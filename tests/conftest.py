"""The surroundings of every test: no network, the same seeds, NaN in fresh memory, clean Dynamo."""

import os

# Read by torch._dynamo when it is imported: a full pass over young objects after every graph.
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"

# Read by huggingface_hub and transformers when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import gc
import logging
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Generator

import hypothesis
import numpy
import pytest
import torch

from qlora_compile import sites
from qlora_compile.kernels import selection
from qlora_compile.kernels.cpu import background, tapes
from qlora_compile.kernels.formats import formats
from qlora_compile.tuning import modes
from qlora_compile.tuning.caution import TRUSTING
from qlora_compile.tuning.tuner import Tuner

# Kernels run in Triton's interpreter where there is no device to compile them for, if the
# environment does not say otherwise. One process does either, as Triton read this variable when it
# was imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# After that variable is set: it defines device functions.
from tests.zero_point_format import ZeroPointFormat

# Before any test module lists the formats.
formats.register(ZeroPointFormat())

# Toy matrices are multiplied faster than threads are woken, and `make test` has a worker per core.
torch.set_num_threads(1)

# pytest gives every logger that does not propagate a handler of its own, and given one, this logger
# writes down all of every compilation: a tenth of the time, and failures drown in it.
logging.getLogger("torch.__trace").propagate = True

# torch.empty & co. give NaN (integers: their maximum), so that code which reads memory it never
# wrote fails. The filling is tied to deterministic mode; warn_only, because there an op without a
# deterministic implementation (put_) would raise. Memory that compiled code allocates for its own
# buffers is not filled.
torch.use_deterministic_algorithms(True, warn_only=True)
assert torch.empty(1).isnan()

# Deadlines fail on compile time and on busy machines; CI must not fail on luck, nor shrink for
# minutes what `print_blob` lets one shrink elsewhere.
IN_CI = "CI" in os.environ
UNSHRUNK = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
hypothesis.settings.register_profile(
    "qlora_compile",
    deadline=None,
    print_blob=True,
    derandomize=IN_CI,
    phases=UNSHRUNK if IN_CI else list(hypothesis.Phase),
)
hypothesis.settings.load_profile("qlora_compile")


# Tests that measure say so; the others choose by the cost model, and none sees the user's records.
os.environ["QLORA_COMPILE_CACHE"] = tempfile.mkdtemp(prefix="qlora_compile_tests_")
modes.AUTO_BUDGET = 0.0

# Whether a head has a region must not depend on the processor; tests of such heads say so.
sites.may_be_slow = lambda weight: False

# Machines that run tests are busy, with other tests above all. Those of load and noise say so.
Tuner.caution = TRUSTING


def pytest_collection_finish() -> None:
    """Spare the collector the million objects that imports made, which it would look through again
    and again: a seventh of the time of a compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["QLORA_COMPILE_CACHE"], ignore_errors=True)


class _TorchRandom:
    """torch's generator in the interface of `random.Random`: hypothesis seeds it per example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis holds it by a weak reference
hypothesis.register_random(_torch_random)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Restore the environment after each test: without CUDA, PEFT's BOFT leaves CXX=gcc, with which
    later processes could not load the C++ that they compile."""
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        os.environ.clear()
        os.environ.update(before)
        _forget_what_libraries_keep()


def _forget_what_libraries_keep() -> None:
    """Reset accelerate, which keeps a Trainer's settings, such as torch_compile, for the whole
    process, and the verbosity of transformers, which the command line lowers."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.set_verbosity_warning()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device and torch sees none")
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def pytest_runtest_teardown() -> None:
    """Forget choices and compiled code: recompile limits and graph counts start afresh."""
    # Another test may have other instructions.
    background.finish()
    modes.forget_tuners()
    tapes.forget()
    selection.modelled.cache_clear()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
