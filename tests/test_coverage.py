"""The sweep over transformers' model types: a sample of it, and its pure functions."""

from __future__ import annotations

from typing import NoReturn

import pytest
import transformers

from bench.coverage import sweep
from bench.coverage.compare import compared
from bench.coverage.kinds import KINDS, Kind, batch, built
from bench.coverage.row import Row, first_line, target_kind, without_names
from bench.coverage.shrink import layers_kept, shrunk, smaller
from bench.coverage.table import markdown, summary


@pytest.mark.parametrize(
    ("name", "others"),
    [("gpt2", {}), ("t5-seq2seq", {}), ("clip", {}), ("granitemoe", {})],
)
def test_a_type_trains_as_with_stock(name: str, others: dict[str, int]) -> None:
    row = compared(KINDS[name])
    assert (row.stock, row.ours) == ("ok", "equal"), row
    assert row.fused_targets == row.targets
    assert row.other_targets == others
    assert row.targets + sum(others.values()) > 0


def test_what_stock_cannot_train_is_a_row() -> None:
    def make() -> NoReturn:
        raise ValueError("no layers\nat all")

    row = compared(Kind("none", "causal", make))
    assert (row.stock, row.ours) == ("ValueError: no layers", "")


def test_every_causal_type_is_there() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= KINDS.keys()


def test_sizes_shrink_and_never_grow() -> None:
    defaults = {"hidden_size": 4096, "num_hidden_layers": 1, "tie": True, "unknown": 9, "seq": None}
    assert smaller(defaults) == {"hidden_size": 64}


def test_dropout_goes() -> None:
    changed = smaller({"hidden_dropout_prob": 0.1, "layerdrop": 0.2, "router_jitter_noise": 0.01})
    assert set(changed.values()) == {0.0}
    assert len(changed) == 3


def test_special_tokens_lie_in_the_vocabulary_and_outside_batches() -> None:
    changed = smaller({"pad_token_id": 999, "eos_token_id": [500, 501], "image_token_id": 99999})
    assert changed["pad_token_id"] == 0
    assert changed["eos_token_id"] == [2]
    assert 100 < changed["image_token_id"] < 128


def test_as_many_key_heads_as_heads_stay_as_many() -> None:
    assert smaller({"num_attention_heads": 32, "num_key_value_heads": 32}) == {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    assert smaller({"num_attention_heads": 32, "num_key_value_heads": 8}) == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }


def test_layers_of_every_kind_are_kept() -> None:
    assert layers_kept([["a"] * 5]) == [0, 1]
    assert layers_kept([["a", "a", "b", "a", "b"]]) == [0, 2]
    assert layers_kept([["a", "a", "b"], [0, 1, 1]]) == [0, 1, 2]
    assert layers_kept([list("abcdef")]) == [0, 1, 2, 3]


def test_lists_per_layer_shrink_together() -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    changed = smaller({"num_hidden_layers": 3, "layer_types": kinds, "other": [1, 2]})
    assert changed == {"num_hidden_layers": 2, "layer_types": [kinds[0], kinds[2]]}


def test_inner_configurations_shrink_too() -> None:
    config = shrunk(transformers.CLIPConfig)
    assert (config.text_config.hidden_size, config.vision_config.hidden_size) == (64, 64)


def test_batches_follow_the_signature() -> None:
    model = built(KINDS["whisper-seq2seq"])
    assert batch(model).keys() == {"input_features", "labels"}
    assert batch(built(KINDS["vit"])).keys() == {"pixel_values", "labels"}


def test_reasons_group() -> None:
    text = (
        "T  Explanation: cannot call `L['x'].a.weight.set_`. Hint: do. Developer debug context: x"
    )
    assert without_names(text) == "T: cannot call `set_`."
    assert without_names("its weight is tied to model.a.b") == "its weight is tied"
    assert without_names("graph breaks split its block into 7 graphs").endswith("several graphs")
    assert first_line(ValueError("\n\n  first\nsecond")) == "ValueError: first"


ROWS = [
    Row("a", "causal", stock="ok", ours="equal", targets=4, fused_targets=4, sites=5, fused=4),
    Row(
        "b",
        "causal",
        stock="ok",
        ours="unequal",
        errors={"loss": 1e-3},
        worst="w",
        targets=4,
        fused_targets=3,
        left_targets={"odd | reason": 1},
        expert_targets=2,
        fused_experts=1,
        left_experts={"odd": 1},
        target_parameters=1000,
        fused_parameters=995,
        other_targets={"Conv1D": 2},
        breaks={"set_": 3},
    ),
    Row("c", "vision", stock="ValueError: no <such> model"),
    Row("d", "vision", stock="ok", ours="RuntimeError: ours"),
]


def test_adapted_modules_group() -> None:
    names = ("MixtralExperts", "MixtralTopKRouter", "DeepseekV3TopkRouter", "Conv1D")
    assert [target_kind(name) for name in names] == ["fused experts", "router", "router", "Conv1D"]


def test_summary() -> None:
    assert summary(ROWS) == [
        "4 model types; stock transformers + PEFT trains 3 of them",
        "1 of these 3 train equally through qlora_compile",
        "7 of 8 adapted linears fused; 2 adapted modules are not linears",
        "1 of 2 adapted weights of experts fused",
        "together 99.5% of the elements of adapted weights",
        "1 types are equal with all adapted linears fused and no graph break",
        "1 types have graph breaks inside blocks",
        "adapted linears left alone: 1 in 1 types: odd | reason (b)",
        "adapted weights of experts left alone: 1 in 1 types: odd (b)",
        "adapted modules that are not linears: 2 in 1 types: Conv1D (b)",
        "graph breaks: 3 in 1 types: set_ (b)",
        "not equal: b: unequal: loss 1.0e-03; most at w",
        "not equal: d: RuntimeError: ours",
    ]


def test_table_has_a_line_for_every_type_and_equal_columns() -> None:
    lines = [line for line in markdown(ROWS, "how").splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ROWS)
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert "no &lt;such> model" in lines[4]


def test_a_worker_that_dies_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def worker(names: list[str], limit: float, inductor: bool):
        started.append(names)
        for name in names:
            if name == "b":
                yield sweep.lost(name, "died")
                return
            yield Row(name, "causal")

    monkeypatch.setattr(sweep, "_worker", worker)
    rows = list(sweep.sweep(["a", "b", "c"], 1.0))
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert rows[1].ours == "died"
    assert started == [["a", "b", "c"], ["c"]]


def test_a_process_that_ends_or_hangs_is_a_row() -> None:
    (ended,) = sweep.sweep(["no such type"], 60.0)
    assert ended.ours == "its process ended with exit code 1"
    (slow,) = sweep.sweep(["llama"], 0.01)
    assert slow.ours == "no result within 0.01 s"
