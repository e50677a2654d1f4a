"""Saved packed models are read by the libraries whose folders they are, and bit for bit by us."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedConfig
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

import qlora_compile
from qlora_compile import QuantizedLoRA
from qlora_compile.capture.regions import uninstall
from qlora_compile.checkpoint_errors import CheckpointError
from qlora_compile.errors import OptionError
from qlora_compile.hf.saving import shards
from qlora_compile.hf.saving.folders.registry import FOLDERS
from qlora_compile.hf.saving.save import SavePacked
from qlora_compile.modules.packed import PackedModule
from qlora_compile.report import regions_of
from qlora_compile.saving_errors import (
    FolderFormatError,
    MergedWeightsError,
    NothingPackedError,
    OldTransformersError,
    PackedFolderVersionError,
    RivalWeightsError,
    SavedModelTypeError,
    SaveOptionError,
    ShardSizeError,
    UnfinishedSaveError,
)
from qlora_compile.sites import Inventory
from tests.hf.test_conv1d import gpt2
from tests.hf.test_experts import toy as experts_toy
from tests.toy_models import tokens, toy

NEEDS_HOOK = pytest.mark.skipif(
    not hasattr(HfQuantizer, "update_attn_implementation"),
    reason="transformers before 5.18 has no hook by which a quantizer names its files",
)

HELD: dict[str, tuple[str, dict[str, Any], str]] = {
    "NF4": ("nf4", {}, "bitsandbytes"),
    "FP4": ("fp4", {"double_quantize": False}, "bitsandbytes"),
    "INT8 by row": ("int8", {"block_size": "row"}, "bitsandbytes"),
    "INT4": ("int4", {"group_size": 32}, "compressed-tensors"),
    "INT4 symmetric": ("int4", {"zeros": "none", "group_size": "row"}, "compressed-tensors"),
    "INT4 float zeros": ("int4", {"zeros": "float"}, "qlora_compile"),
    "INT4 minima": ("int4", {"zeros": "minimum"}, "qlora_compile"),
    "INT4 in any groups": ("int4", {"grouping": "indexed"}, "qlora_compile"),
    "INT8 in blocks": ("int8", {}, "qlora_compile"),
    "NVFP4": ("nvfp4", {}, "qlora_compile"),
}
"""Formats with options, and the folder that is chosen for them."""


def packed(held: str = "INT8 in blocks", model: Any = None) -> Any:
    model = toy(dtype=torch.bfloat16, attention_bias=True) if model is None else model
    return qlora_compile.optimize(model, quantize=HELD[held][0], **HELD[held][1])


def dense(model: Any) -> dict[str, Tensor]:
    """Return the decoded weights of our packed Linears."""
    modules = model.named_modules()
    return {name: m.dequantize() for name, m in modules if isinstance(m, PackedModule)}


def read(module: Any) -> Any:
    """Return the weight of a Linear, as the library that reads it decodes it."""
    kind = type(module)
    if kind is Linear4bit:
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    if kind is Linear8bitLt:
        state = module.state
        scales = module.weight.SCB if state.SCB is None else state.SCB
        return (module.weight.data * (scales.unsqueeze(1) / 127)).to(torch.bfloat16)
    return module.weight


@pytest.mark.parametrize("held", [each for each in HELD if HELD[each][2] != "qlora_compile"])
def test_stock_transformers_reads_it(held: str, tmp_path: Path) -> None:
    model = packed(held)
    assert qlora_compile.save(model, tmp_path, max_shard_size="30KB") == HELD[held][2]
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert HELD[held][2] in (tmp_path / "README.md").read_text()
    options: dict[str, Any] = {}
    if HELD[held][2] == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for name, weight in dense(model).items():
        assert torch.equal(read(loaded.get_submodule(name)), weight), name
    theirs = loaded.state_dict()
    plain = {k: v for k, v in model.state_dict().items() if v.dtype == torch.bfloat16}
    for name in plain.keys() - {f"{layer}.scales" for layer in dense(model)}:
        assert torch.equal(theirs[name], plain[name]), name


MODELS = {
    "tied": lambda: toy("Gemma3", tie_word_embeddings=True),
    "Conv1D": gpt2,
    "mixtral": lambda: experts_toy("mixtral"),
    "gpt_oss": lambda: experts_toy("gpt_oss"),
}


@pytest.mark.parametrize("held", [each for each in HELD if HELD[each][2] == "qlora_compile"])
def test_what_no_library_reads_goes_to_our_folder(held: str, tmp_path: Path) -> None:
    model = packed(held)
    assert qlora_compile.save(model, tmp_path) == HELD[held][2]
    loaded = qlora_compile.load(tmp_path, dtype=model.dtype)
    assert_same(loaded.state_dict(), model.state_dict())


@NEEDS_HOOK
@pytest.mark.parametrize("kind", MODELS)
def test_ours_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = packed(model=MODELS[kind]())
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not list(tmp_path.glob("model*"))
    loaded = type(model).from_pretrained(tmp_path)
    assert_same(loaded.state_dict(), model.state_dict())
    ids = tokens()
    assert torch.equal(plain(model)(ids).logits, loaded(ids).logits)
    direct = qlora_compile.load(tmp_path, dtype=model.dtype)
    assert_same(direct.state_dict(), model.state_dict())
    assert torch.equal(loaded(ids).logits, direct.eval()(ids).logits)
    loaded.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def plain(model: Any) -> Any:
    """Return an optimised model in evaluation, without its compiled regions: compiling takes
    seconds."""
    for region in regions_of(Inventory(model)).values():
        uninstall(region.module)
    return model.eval()


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_an_older_transformers_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    with monkeypatch.context() as older:
        older.delattr(HfQuantizer, "update_attn_implementation", raising=False)
        with pytest.raises(OldTransformersError, match=r"call qlora_compile\.load\(folder\)"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(qlora_compile.load(tmp_path, dtype=model.dtype).state_dict(), model.state_dict())


def test_without_us_transformers_finds_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed().save_pretrained(tmp_path)
    for registry in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(registry, "qlora_compile")
    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_transformers_own_saving_is_refused(tmp_path: Path) -> None:
    config = qlora_compile.QloraCompileConfig("nf4")
    toy().save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    with pytest.raises(ValueError, match="not serializable"):
        type(loaded).save_pretrained(loaded, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert isinstance(loaded.save_pretrained, SavePacked)


@NEEDS_HOOK
def test_base_and_adapters_of_a_peft_model(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = qlora_compile.optimize(toy(), lora, quantize="uint8", group_size=32).eval()
    qlora_compile.save(model, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = tokens()
    assert torch.equal(loaded(ids).logits, plain(model)(ids).logits)
    model.merge_adapter()
    with pytest.raises(MergedWeightsError, match="unmerge_adapter"):
        qlora_compile.save(model, tmp_path / "merged")


def test_adapters_of_a_former_save_go_and_others_stay(tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = qlora_compile.optimize(toy(num_hidden_layers=1), lora, quantize="nf4")
    base, trained, saved = model.get_base_model(), tmp_path / "trained", tmp_path / "saved"
    model.save_pretrained(str(trained / "adapter"))
    before = files(trained)
    qlora_compile.save(base, trained)
    assert before.items() <= files(trained).items()
    qlora_compile.save(model, saved)
    assert (saved / "adapter").is_dir()
    qlora_compile.save(base, saved)
    assert not (saved / "adapter").exists()


class Hub:
    """Stands for `HfApi`, and keeps what is uploaded."""

    def __init__(self, cards: bool = False) -> None:
        self.cards, self.files, self.given = cards, {}, {}

    def __call__(self, token: Any = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self.created = name, options
        return SimpleNamespace(repo_id=f"someone/{name}")

    def file_exists(self, repository: str, name: str, **options: Any) -> bool:
        return self.cards

    def upload_folder(self, *, folder_path: Path, ignore_patterns: Any, **given: Any) -> str:
        left = ignore_patterns or []
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        self.files = {f.relative_to(folder_path).as_posix(): f.read_bytes() for f in files}
        self.files = {name: each for name, each in self.files.items() if name not in left}
        self.given = given
        return "https://commit"

    def downloaded(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_a_packed_model_is_pushed_with_its_model_card(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, model = Hub(), packed()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    options: dict[str, Any] = {"token": "secret", "private": True, "create_pr": True}
    if way == "push_to_hub":
        url = model.push_to_hub("packed", max_shard_size="30KB", **options)
        assert url == "https://commit"
    else:
        options |= {"push_to_hub": True, "max_shard_size": "30KB"}
        model.save_pretrained(tmp_path / "packed", **options)
    assert (hub.token, hub.created) == ("secret", ("packed", {"private": True, "exist_ok": True}))
    assert hub.given["repo_id"] == "someone/packed"
    assert hub.given["create_pr"] is True
    folder = hub.downloaded(tmp_path / "downloaded")
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = qlora_compile.load(folder, dtype=model.dtype)
    assert_same(again.state_dict(), model.state_dict())
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert "import qlora_compile\nfrom transformers import LlamaForCausalLM" in code


def test_a_card_on_the_hub_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(cards=True), packed()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    model.push_to_hub("packed")
    assert "config.json" in hub.files
    assert "README.md" not in hub.files
    with pytest.raises(SaveOptionError, match="tags"):
        model.push_to_hub("packed", tags=["mine"])


@NEEDS_HOOK
@pytest.mark.parametrize("held", ["INT8 in blocks", "NF4", "INT4"])
def test_the_model_card_loads_the_folder(held: str, tmp_path: Path) -> None:
    model = packed(held)
    qlora_compile.save(model, tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"folder": tmp_path}
    exec(code, names)
    loaded: Any = names["model"]
    assert torch.isfinite(loaded(tokens()).logits).all()


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SAVES: dict[str, Callable[[Any, Path], Any]] = {
    "packed": lambda model, folder: model.get_base_model().save_pretrained(folder),
    "packed with adapters": lambda model, folder: qlora_compile.save(model, folder),
    "merged": lambda model, folder: qlora_compile.merge(model, folder, torch.float32),
    "adapters": lambda model, folder: QuantizedLoRA.save(owner(model), folder),
}


def owner(model: Any) -> Any:
    """What `QuantizedLoRA.save` needs of its object."""
    return SimpleNamespace(model=model, tokenizer=None)


def adapted(number: int) -> Any:
    model = toy(num_hidden_layers=1)
    torch.manual_seed(number)
    lora = LoraConfig(r=32, target_modules="all-linear", init_lora_weights=False)
    return qlora_compile.optimize(model, lora, quantize="uint8", group_size=(32, 64)[number])


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("kind", SAVES)
def test_a_full_disk_and_ctrl_c_leave_the_old_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = adapted(0), adapted(1)
    folder = tmp_path / "model"
    SAVES[kind](old, folder)
    before = files(folder)
    with files_up_to(20_000), pytest.raises(UnfinishedSaveError, match="unchanged"):
        SAVES[kind](new, folder)
    assert files(folder) == before
    # Each of the writers, from the first file to the last.
    writers = ["adapters"] if kind == "adapters" else ["weights", "config"]
    writers += ["adapters"] * (kind == "packed with adapters")
    places = {
        "weights": (shards, "save_file"),
        "config": (PreTrainedConfig, "save_pretrained"),
        "adapters": (peft_model, "safe_save_file"),
    }
    for writer in writers:

        def interrupt(*args: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            module, name = places[writer]
            patched.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                SAVES[kind](new, folder)
        assert files(folder) == before, writer
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    SAVES[kind](new, folder)
    assert files(folder) != before


def test_errors_come_before_anything_is_written(tmp_path: Path) -> None:
    model, target = packed(), tmp_path / "new"
    for error, call in (
        (NothingPackedError, lambda: qlora_compile.save(toy(), target)),
        (SavedModelTypeError, lambda: qlora_compile.save(torch.nn.Linear(2, 2), target)),
        (FolderFormatError, lambda: qlora_compile.save(model, target, stored_as="bitsandbytes")),
        (OptionError, lambda: qlora_compile.save(model, target, stored_as="gguf")),
        (ShardSizeError, lambda: model.save_pretrained(target, max_shard_size="big")),
        (SaveOptionError, lambda: model.save_pretrained(target, variant="fp16")),
        (SaveOptionError, lambda: model.save_pretrained(target, state_dict={})),
    ):
        with pytest.raises(error):
            call()
        assert not target.exists()
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(RivalWeightsError, match=r"model\.safetensors"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@NEEDS_HOOK
def test_a_folder_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match="the model has none there"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (AutoModelForCausalLM.from_pretrained, qlora_compile.load):
        with pytest.raises(PackedFolderVersionError, match="version 2"):
            load(tmp_path)


def test_every_folder_is_tested() -> None:
    assert {kind.name for kind in FOLDERS} == {folder for _, _, folder in HELD.values()}
