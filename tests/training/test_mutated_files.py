"""Files changed by accident give an error of ours or a right result, never another crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qlora_compile
from qlora_compile.errors import QloraCompileError
from qlora_compile.hf import loading
from qlora_compile.outputs import damage
from qlora_compile.training.adapted import adapter_settings
from qlora_compile.training.settings import RunSettings, settings_from, write_settings
from qlora_compile.tuning import record
from qlora_compile.tuning.errors import RecordLineError
from qlora_compile.verify.certificate import from_line, to_line
from tests.examples import examples
from tests.toy_language_model import toy_llama
from tests.tuning.records import sample_record
from tests.verify.test_certificate import certificate

NASTY = (b"null", b"-1", b"1e999", b"NaN", b'""', b"[]", b"{}", b"\x00", b"\xff", b"[" * 2000)


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """Return `content` with one to three changes of bytes, ranges or values."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(changed)))
        stop = draw(st.integers(start, min(len(changed), start + 40)))
        kind = draw(st.sampled_from(("replace", "cut", "value", "repeat")))
        if kind == "replace":
            changed[start:stop] = draw(st.binary(max_size=8))
        elif kind == "cut":
            del changed[start:]
        elif kind == "value":
            places = [n for n, byte in enumerate(changed) if byte in b':,"']
            after = draw(st.sampled_from(places)) + 1 if places else start
            ends = min((n for n in places if n > after), default=len(changed))
            changed[after:ends] = draw(st.sampled_from(NASTY))
        else:
            changed[start:start] = changed[start:stop]
    return bytes(changed)


def drawn(count: int) -> Any:
    """Return the number of examples: 2,000 in all in the long range, a twentieth in the suite."""
    return settings(
        max_examples=examples(count, 20),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


LINES: dict[str, tuple[Any, Any, Callable[[str], Any]]] = {
    "record": (sample_record(), record.to_line, record.from_line),
    "certificate": (certificate(), to_line, from_line),
}


@pytest.mark.parametrize("kind", LINES)
@drawn(250)
@given(st.data())
def test_a_line_is_refused_or_the_same(kind: str, data: st.DataObject) -> None:
    value, write, read = LINES[kind]
    line = data.draw(mutated(write(value).encode())).decode("ascii", errors="replace")
    try:
        assert read(line) == value
    except RecordLineError:
        assert line != write(value)


@drawn(500)
@given(st.data())
def test_settings_are_refused_or_of_their_types(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "run.yaml"
    chosen = RunSettings(
        "a/b", ("c", "d"), rank_pattern={"q": 2}, options={"adam_beta1": 0.5}, steps=3, packing=True
    )
    write_settings(chosen, file)
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    try:
        found = settings_from({}, file)
        found.check_ranges()
    except QloraCompileError:
        return
    assert isinstance(found.steps, int | None)
    assert isinstance(found.rank, int)


@drawn(400)
@given(st.data())
def test_an_adapters_configuration_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    written = {"base_model_name_or_path": "a/b", "peft_type": "LORA", "r": 4, "bias": "none"}
    content = data.draw(mutated(json.dumps(written).encode()))
    (tmp_path / "adapter_config.json").write_bytes(content)
    try:
        found = adapter_settings(tmp_path, None, None)
    except QloraCompileError:
        return
    assert isinstance(found.model, str)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packed weights."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    model: Any = toy_llama()
    qlora_compile.optimize(model, quantize="nf4", tune="off")
    model.save_pretrained(folder)
    return folder


@drawn(300)
@given(st.data())
def test_a_models_configuration_is_refused_or_read(packed: Path, data: st.DataObject) -> None:
    folder = packed.with_name("configured")
    folder.mkdir(exist_ok=True)
    content = data.draw(mutated((packed / "config.json").read_bytes()))
    (folder / "config.json").write_bytes(content)
    try:
        loading.load_config(folder)
    except QloraCompileError:
        return


@drawn(200)
@given(st.data())
def test_a_packed_folder_is_refused_or_read(packed: Path, data: st.DataObject) -> None:
    """The header of its weights, which alone says what they are."""
    folder = packed.with_name("damaged")
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    file.write_bytes(data.draw(mutated(content[:header])) + content[header:])
    try:
        loading.load_model(folder)
    except QloraCompileError:
        return


@drawn(100)
@given(st.data())
def test_damage_is_told_of_any_checkpoint(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("trainer_state.json", "a.safetensors", "optimizer.pt")))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / name).write_bytes(data.draw(mutated(b'\x08\x00\x00\x00\x00\x00\x00\x00{"a": 1}')))
    assert damage(tmp_path) is None or isinstance(damage(tmp_path), str)
