"""QuantizedLoRA: every kind of dataset, every bad input, saving and going on."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd
import peft
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BertModel, TrainerCallback

from qlora_compile import api, data_errors, errors
from qlora_compile.hf.dataset import Batching
from qlora_compile.hf.training import FineTuning
from qlora_compile.quantized_lora import QuantizedLoRA
from qlora_compile.training.model_choice import DEFAULT_FORMAT
from qlora_compile.training.run import TrainingRun
from qlora_compile.training.settings import RunSettings
from qlora_compile.training_errors import NotFiniteError
from tests.hf.checkpoints.written import KINDS, written
from tests.hf.trainer.chats import turns
from tests.toy_language_model import LONGEST, chat_tokenizer, toy_bert, toy_llama, toy_tokenizer
from tests.toy_models import toy, with_bitsandbytes

TEXTS = ["a first text", "and a second, longer one", " ", "a third"] * 4
OPTIONS: dict[str, Any] = {"max_steps": 2, "disable_tqdm": True}


class TokenDicts(Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class TokenStream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(token_rows())


def token_rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.arange(length) % 90} for length in (5, 9, 9, 7)] * 4


def text_table(**columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS, **columns})


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Adapters by PEFT, nothing quantised or compiled: these tests are about the rest."""
    calls: list[dict[str, Any]] = []

    def optimize(model: Any, lora: Any, **options: Any) -> Any:
        calls.append(options)
        return peft.get_peft_model(model, lora)

    monkeypatch.setattr(api, "optimize", optimize)
    return calls


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: Any, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


DATASETS: dict[str, Callable[[], Any]] = {
    "strings": lambda: TEXTS,
    "generator of strings": lambda: (text for text in TEXTS),
    "torch dataset of strings": lambda: TokenDicts(TEXTS),
    "table of text": text_table,
    "table of text and more": lambda: text_table(source=["x"] * len(TEXTS)),
    "table of tokens": lambda: datasets.Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()} for row in token_rows()]
    ),
    "frame of text": lambda: pd.DataFrame({"text": TEXTS, "source": "x"}),
    "frame of tokens": lambda: pd.DataFrame(
        {"input_ids": [row["input_ids"].tolist() for row in token_rows()]}
    ),
    "torch dataset": lambda: TokenDicts(token_rows()),
    "torch stream": TokenStream,
    "list of token dicts": token_rows,
    "token dicts with labels": lambda: TokenDicts(
        [{**row, "labels": row["input_ids"]} for row in token_rows()]
    ),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_a_causal_model_trains_on(kind: str, stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    before = weights(q.model)
    output = q.train(DATASETS[kind](), **OPTIONS)
    assert output.global_step == 2
    assert 4 < output.training_loss < 6
    changed = {n for n, t in q.model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_bits_become_formats(stock: list[dict[str, Any]]) -> None:
    QuantizedLoRA(toy_llama(), quantization_bits=4, block_size=128, strict=True)
    QuantizedLoRA(toy_llama())
    common = {"double_quantize": True, "block_size": 128, "strict": True}
    assert stock[0] == {"quantize": "nf4", **common}
    assert stock[1] == {"quantize": "nf4", "double_quantize": True, "block_size": None}
    QuantizedLoRA(toy_llama(), rank=4, quantization_bits=8)
    assert stock[2] == {"quantize": "int8", "double_quantize": False, "block_size": None}


def test_alpha_is_twice_the_rank_unless_given(stock: list[dict[str, Any]]) -> None:
    assert QuantizedLoRA(toy_llama(), 3).model.peft_config["default"].lora_alpha == 6
    q = QuantizedLoRA(toy_llama(), 3, alpha=5, dropout=0.1, target_modules=["q_proj"])
    config = q.model.peft_config["default"]
    assert (config.lora_alpha, config.lora_dropout) == (5, 0.1)
    assert config.target_modules == {"q_proj"}


@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_classifier_trains_with_its_own_labels(name: str, stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_bert(), tokenizer=toy_tokenizer())
    head = q.model.base_model.model.classifier.modules_to_save["default"]
    before = head.weight.clone()
    output = q.train(text_table(**{name: [0, 1] * (len(TEXTS) // 2)}), **OPTIONS)
    assert output.global_step == 2
    assert not torch.equal(head.weight, before)


def test_training_goes_on_where_it_stopped(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    settings = {"max_steps": 20, "learning_rate": 1e-2, "disable_tqdm": True}
    first = q.train(TEXTS, **settings).training_loss
    assert q.train(TEXTS, **settings).training_loss < first - 0.2


def test_texts_are_cut_at_the_length_asked_for(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    assert q.train(["x" * (LONGEST + 9)] * 8, **OPTIONS).global_step == 2
    with pytest.raises(errors.OutOfRangeError, match="max_length=0"):
        q.train(TEXTS, max_length=0, **OPTIONS)


def test_batches_are_padded_by_position() -> None:
    batch = Batching(pad_token=7, add_labels=True)(
        [{"input_ids": [1, 2, 7]}, {"input_ids": torch.tensor([3])}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 7], [3, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 7], [3, -100, -100]]
    labelled = Batching(pad_token=0, add_labels=False)(
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}]
    )
    assert labelled["labels"].tolist() == [[1, 2], [3, -100]]
    equal = Batching(pad_token=0, add_labels=True)([{"input_ids": [1, 2]}] * 2)
    assert set(equal) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization_bits": 3}, errors.QuantizationBitsError, "quantization_bits=3"),
        ({"quantization_bits": True}, errors.QuantizationBitsError, "pass 4"),
        ({"rank": 0}, errors.OutOfRangeError, "rank=0"),
        ({"rank": 2.5}, errors.OutOfRangeError, "rank=2.5"),
        ({"alpha": -1}, errors.OutOfRangeError, "alpha=-1"),
        ({"dropout": 1.0}, errors.OutOfRangeError, "dropout=1.0"),
        ({"target_modules": ["no_such"]}, errors.AdapterTargetError, "no_such"),
        ({"target_modules": ["q_proj", "vproj"]}, errors.AdapterTargetError, "'vproj'.*v_proj"),
        ({"block_size": 63}, errors.BlockSizeError, "63"),
    ],
)
def test_a_bad_setting_leaves_the_model_alone(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = toy_llama()
    before = weights(model)
    with pytest.raises(error, match=message):
        QuantizedLoRA(model, **arguments)
    assert_unchanged(model, before)


def test_a_model_must_be_a_plain_transformers_model(tmp_path: Path) -> None:
    module: Any = torch.nn.Linear(4, 4)
    with pytest.raises(errors.ModelTypeError, match="Linear"):
        QuantizedLoRA(module)
    adapted: Any = peft.get_peft_model(toy_llama(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(errors.AdaptersPresentError, match="PeftModel"):
        QuantizedLoRA(adapted)
    with pytest.raises(errors.ModelNotFoundError, match="does not exist"):
        QuantizedLoRA(tmp_path / "absent" / "model")
    with pytest.raises(errors.ModelNotFoundError, match=r"no config\.json"):
        QuantizedLoRA(tmp_path)


def test_remedies_are_arguments_that_there_are() -> None:
    known = set(inspect.signature(QuantizedLoRA).parameters)
    # As transformers' own `add_adapter` does, which asks for a PEFT that may not be here.
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules="all-linear"), toy_llama()
    )
    for model in (with_bitsandbytes(toy(), 4), with_bitsandbytes(toy(), 8), adapted):
        with pytest.raises(errors.QloraCompileError) as raised:
            QuantizedLoRA(model)
        message = str(raised.value)
        own, advice, _ = message.partition("optimize with ")
        assert advice
        assert known >= set(re.findall(r"(\w+)=", own))


BAD_DATASETS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty list": (list, errors.EmptyDatasetError, "no examples"),
    "empty torch dataset": (lambda: TokenDicts([]), errors.EmptyDatasetError, "no examples"),
    "empty table": (lambda: text_table().select([]), errors.EmptyDatasetError, "no examples"),
    "blank strings": (lambda: [" ", "\n"], errors.EmptyDatasetError, "no examples"),
    "one string": (lambda: "text", data_errors.DataSourceError, "the file does not exist"),
    "a number": (lambda: 3, errors.DatasetTypeError, "an? int"),
    "prompts alone": (
        lambda: datasets.Dataset.from_dict({"prompt": ["a"]}),
        data_errors.ObjectiveRowsError,
        "kind 'prompt'.*'sft' trains on",
    ),
    "mixed": (lambda: ["a", 3], errors.DatasetTypeError, "row 1 is a int beside a str"),
    "no input_ids": (lambda: [{"ids": [1]}], data_errors.DataColumnsError, "the columns ids"),
    "splits without one to train on": (
        lambda: datasets.DatasetDict({"test": text_table()}),
        data_errors.SplitNameError,
        "splits test",
    ),
}


@pytest.mark.parametrize("kind", BAD_DATASETS)
def test_a_bad_dataset_leaves_the_model_alone(kind: str, stock: list[dict[str, Any]]) -> None:
    dataset, error, message = BAD_DATASETS[kind]
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    before = weights(q.model)
    with pytest.raises(error, match=message):
        q.train(dataset(), **OPTIONS)
    assert_unchanged(q.model, before)


@pytest.mark.parametrize("dataset", [TEXTS, text_table()])
def test_text_without_a_tokenizer_is_an_error(dataset: Any, stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama())
    with pytest.raises(errors.TokenizerMissingError, match="tokenizer="):
        q.train(dataset, **OPTIONS)


def test_an_encoder_without_labels_is_an_error(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_bert(), tokenizer=toy_tokenizer())
    before = weights(q.model)
    with pytest.raises(errors.MissingLabelsError, match="BertForSequenceClassification was called"):
        q.train(TEXTS, **OPTIONS)
    assert_unchanged(q.model, before)
    headless = QuantizedLoRA(BertModel(toy_bert().config), tokenizer=toy_tokenizer())
    with pytest.raises(errors.NoLossError, match="BertModel"):
        headless.train(TEXTS, **OPTIONS)


def test_an_unknown_option_names_the_nearest(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    with pytest.raises(errors.TrainingOptionError, match=r"'learningrate'.*learning_rate"):
        q.train(TEXTS, learningrate=1e-3)
    with pytest.raises(errors.TrainingOptionError, match="its documentation"):
        q.train(TEXTS, zzzz=1)


def test_a_batch_that_is_not_finite_stops_or_is_skipped(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    before = weights(q.model)
    layer = q.model.get_base_model().model.layers[1]
    with layer.register_forward_hook(lambda *given: given[-1] * float("nan")):
        with pytest.raises(NotFiniteError, match=r"^step 1: .*on_nan='skip'"):
            q.train(TEXTS, **OPTIONS)
        assert q.train(TEXTS, on_nan="skip", **OPTIONS).global_step == 2
    assert_unchanged(q.model, before)
    with pytest.raises(errors.OptionError, match=r"on_nan='ignore'.*stop or skip"):
        q.train(TEXTS, on_nan="ignore", **OPTIONS)


def test_nothing_is_written_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    q.train(TEXTS, **OPTIONS)
    assert not list(tmp_path.iterdir())
    q.train(TEXTS, output_dir="run", **OPTIONS)
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_saving_where_nothing_can_be_written(tmp_path: Path, stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama())
    (tmp_path / "file").touch()
    with pytest.raises(errors.OutputDirectoryError, match="this is a file"):
        q.save(tmp_path / "file")
    with pytest.raises(errors.OutputDirectoryError, match="is a file"):
        q.save(tmp_path / "file" / "below")


@pytest.mark.parametrize("bits", [4, 8])
def test_from_a_path_through_the_compiler_to_stock_peft(bits: int, tmp_path: Path) -> None:
    toy_llama().save_pretrained(tmp_path / "base")
    toy_tokenizer().save_pretrained(tmp_path / "base")
    q = QuantizedLoRA(tmp_path / "base", 4, bits)
    options = {**OPTIONS, "max_steps": 4, "learning_rate": 1e-2}
    # One length, so that one graph is compiled.
    output = q.train(["sixteen letters."] * 8, **options)
    assert output.global_step == 4
    q.save(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ours = peft.get_peft_model_state_dict(q.model)
    theirs = peft.get_peft_model_state_dict(loaded)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)
    assert any(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    assert all(site.fused for site in api.explain(q.model).sites if "lm_head" not in site.name)


def test_chats_are_learnt_evaluated_and_answered(stock: list[dict[str, Any]]) -> None:
    q = QuantizedLoRA(toy_llama(longest=256), tokenizer=chat_tokenizer())
    chats = [{"messages": turns("say it", "xyz")}] * 8
    q.train(chats, eval_dataset=chats[:2], **OPTIONS)
    q.model.train()
    answer = q.generate(turns("say it"), max_new_tokens=12)
    assert q.model.training
    asked = q.tokenizer.apply_chat_template(
        turns("say it"), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = q.model.eval().generate(**asked, max_new_tokens=12, do_sample=False)
    new = ids[0, asked["input_ids"].shape[1] :]
    assert answer == q.tokenizer.decode(new, skip_special_tokens=True) != ""
    assert q.generate("text", max_new_tokens=3)
    with pytest.raises(errors.TokenizerMissingError, match="the prompt is text"):
        QuantizedLoRA(toy_llama()).generate("text")


def test_evaluation_follows_each_epoch(stock: list[dict[str, Any]]) -> None:
    class Seen(TrainerCallback):
        losses: ClassVar[list[float]] = []

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
        ) -> None:
            self.losses.append(metrics["eval_loss"])

    tuning = FineTuning(
        QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer()).model,
        TEXTS,
        tokenizer=toy_tokenizer(),
        eval_dataset=TEXTS[:2],
        options={"num_train_epochs": 2, "disable_tqdm": True},
    )
    tuning.trainer.add_callback(Seen)
    tuning.train()
    assert len(Seen.losses) == 2


def test_merging_writes_a_plain_model(stock: list[dict[str, Any]], tmp_path: Path) -> None:
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    q.train(TEXTS, learning_rate=1e-2, **OPTIONS)
    report = q.merge(tmp_path / "merged", dtype=torch.float32, texts=["some text " * 20])
    assert report.merged is not None
    assert report.base is not None
    assert report.merged.logits < 1e-3 * report.base.logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(9)[None]
    expected = q.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == q.tokenizer.eos_token


def test_adapters_and_tokenizer_are_pushed(
    stock: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, str, dict[str, Any]]] = []

    def push(self: Any, name: str, **options: Any) -> None:
        pushed.append((type(self).__name__, name, options))

    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    for each in (q.model, q.tokenizer):
        monkeypatch.setattr(type(each), "push_to_hub", push)
    q.push_to_hub("someone/adapter", private=True)
    assert [name for _, name, _ in pushed] == ["someone/adapter"] * 2
    assert all(options == {"private": True} for _, _, options in pushed)
    assert "Tokenizer" in pushed[1][0]


def test_the_command_line_has_the_same_defaults(
    stock: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = RunSettings(model="demo", data=("demo",), output=str(tmp_path))
    q = QuantizedLoRA(toy_llama(), tokenizer=toy_tokenizer())
    config = q.model.peft_config["default"]
    choice = settings.choice
    assert (choice.format, DEFAULT_FORMAT) == (None, stock[0]["quantize"])
    assert (config.r, config.lora_alpha, config.lora_dropout) == (choice.rank, 32, choice.dropout)
    options = {"output_dir": str(tmp_path), "disable_tqdm": True}
    arguments = [
        FineTuning(q.model, TEXTS, tokenizer=q.tokenizer, options=options).trainer.args.to_dict(),
        TrainingRun(settings).tuning(q.model, q.tokenizer, TEXTS, None).trainer.args.to_dict(),
    ]
    differing = {name for name in arguments[0] if arguments[0][name] != arguments[1][name]}
    # The command line draws the loss of each step.
    assert differing == {"logging_steps", "logging_nan_inf_filter"}


def test_a_quantised_checkpoint_stays_as_it_is_stored(tmp_path: Path) -> None:
    written(tmp_path, toy_llama(), KINDS["fp8"])
    ours = QuantizedLoRA(tmp_path, target_modules=["q_proj"], tune="model")
    formats = {type(m).__name__: m.format for m in ours.model.modules() if hasattr(m, "layout")}
    assert formats == {"QuantizedLinear": KINDS["fp8"].format}
    with pytest.raises(errors.AlreadyQuantizedError):
        QuantizedLoRA(tmp_path, quantization_bits=8)
