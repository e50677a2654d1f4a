"""Files changed by accident give an error of ours or a right result, never another crash.

`make test-damage` draws all: 2,400 here, and 300 in `tests/hf/checkpoints/test_damage.py`. Nothing
reads a report or metrics.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qlora_compile
from qlora_compile.errors import QloraCompileError
from qlora_compile.hf import loading
from qlora_compile.hf.checkpoints.folder import _shards
from qlora_compile.hf.dataset import rows_of
from qlora_compile.kernels.device_model import CpuModel
from qlora_compile.outputs import DIGESTS, damage, write_digests
from qlora_compile.training.adapted import adapter_settings
from qlora_compile.training.settings import RunSettings, settings_from, write_settings
from qlora_compile.tuning import cpu_figures, record
from qlora_compile.tuning.errors import RecordLineError
from qlora_compile.tuning.parsed_sources import ParsedSources
from qlora_compile.verify.certificate import from_line, to_line
from tests.mutations import drawn, mutated
from tests.toy_language_model import toy_llama
from tests.tuning.records import sample_record
from tests.verify.test_certificate import certificate

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
        found = adapter_settings(tmp_path, None, "nf4")
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


def zipped(content: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data", content)
    return file.getvalue()


STATE = {
    "trainer_state.json": b'{"global_step": 1}',
    "adapter_model.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    "optimizer.pt": zipped("exp_avg"),
    "rng_state.pth": zipped("numpy"),
}


@drawn(100)
@given(st.data())
def test_a_checkpoint_is_whole_or_damaged(tmp_path: Path, data: st.DataObject) -> None:
    """With digests, whatever was changed; the losses of a run that resumes from what is whole are
    tested in test_faults.py."""
    for name, content in STATE.items():
        (tmp_path / name).write_bytes(content)
    has_digests = data.draw(st.booleans())
    (tmp_path / DIGESTS).unlink(missing_ok=True)
    if has_digests:
        write_digests(tmp_path)
    name = data.draw(st.sampled_from([*STATE, *[DIGESTS] * has_digests]))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(changed := data.draw(mutated(content)))
    found = damage(tmp_path)
    assert found is None or isinstance(found, str)
    if has_digests and name != DIGESTS:
        assert (found is None) == (changed == content)
        (tmp_path / name).unlink()
        assert damage(tmp_path) == f"{name} is missing"


def figures() -> CpuModel:
    each = (1e9, 1e9, 1e9, 1e9)
    return CpuModel("a CPU", "cpu", 1e9, 1e9, 1.0, 1, each, each, each, 1e-6, 1e-9)


@drawn(200)
@given(st.data())
def test_a_cpus_figures_are_whole_or_measured_anew(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "cpu.json"
    file.write_bytes(data.draw(mutated(json.dumps(asdict(figures())).encode())))
    found = cpu_figures._read(file)
    assert found is None or all(0 < each < math.inf for each in (*found.gemm, found.operator))


@drawn(100)
@given(st.data())
def test_a_file_of_parsed_sources_is_whole_or_counts_as_empty(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "cache"
    whole = ParsedSources(folder)
    whole.find("a key", lambda: ("a digest", [["a.module", "a.module.name"]]))
    whole.write()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(changed := data.draw(mutated(content)))
    found = ParsedSources(folder).find("a key", lambda: ("parsed", []))
    assert tuple(found) in (("a digest", [["a.module", "a.module.name"]]), ("parsed", []))
    assert found[0] == "a digest" or changed != content


@drawn(100)
@given(st.data())
def test_an_index_of_shards_is_refused_or_names_files(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "model.safetensors.index.json"
    places = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    file.write_bytes(data.draw(mutated(json.dumps({"weight_map": places}).encode())))
    try:
        found = _shards(file)
    except QloraCompileError:
        return
    assert all(shard.parent == tmp_path for shard in found)


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three rows in files of all endings."""
    rows = [{"text": f"{number} the quick brown fox"} for number in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    parquet = tmp_path_factory.mktemp("whole") / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(parquet)
    return {
        ".jsonl": lines,
        ".json": json.dumps(rows).encode(),
        ".csv": b"text\n" + b"".join(b"%s\n" % row["text"].encode() for row in rows),
        ".jsonl.gz": gzip.compress(lines),
        ".parquet": parquet.read_bytes(),
    }


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"])
@drawn(20)
@given(st.data())
def test_rows_are_refused_or_read(
    ending: str, contents: dict[str, bytes], tmp_path: Path, data: st.DataObject
) -> None:
    file = tmp_path / f"rows{ending}"
    file.write_bytes(data.draw(mutated(contents[ending])))
    try:
        rows_of(file)
    except QloraCompileError:
        return
