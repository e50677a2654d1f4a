"""Shrinks a configuration's defaults: every size is small, and all sizes are consistent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from bench.coverage.sizes import CORRECTIONS, LAYER_COUNTS, SMALL, VOCABULARY

_MOST_LAYERS = 4
_SPECIAL = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1}


def shrunk(config_class: type[PretrainedConfig], **given: Any) -> Any:
    """Return a configuration of `config_class` at toy size: its defaults with the changes of
    `smaller`, the corrections of its type, and `given`."""
    own = CORRECTIONS.get(config_class.model_type, {})
    start = {name: own[name] for name in own.get("_start", ())}
    default = config_class(**start)
    names = {field.name for field in fields(config_class)}
    changed = smaller({k: v for k, v in vars(default).items() if k in names})
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            changed[name] = shrunk(type(value))
    chosen = {k: v for k, v in {**changed, **own, **given}.items() if k != "_start"}
    return config_class(**start | chosen)


def smaller(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `values` that change, with their toy values.

    Sizes never grow; switches and missing values stay. Random parts (dropout, noise) are switched
    off, because two runs are compared. Lists with one entry per layer keep the layers of
    `layers_kept`, and the number of layers follows.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, bool) or value is None:
            continue
        if _is_random(name) and isinstance(value, int | float):
            changed[name] = type(value)(0)
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            changed[name] = _token(name, value)
        elif isinstance(value, int) and name in SMALL:
            changed[name] = min(value, SMALL[name])
    per_layer = _per_layer(values)
    if per_layer:
        kept = layers_kept([values[name] for name in per_layer])
        changed |= {name: [values[name][index] for index in kept] for name in per_layer}
        changed |= {name: len(kept) for name in LAYER_COUNTS if name in values}
    heads = _attention_heads(values)
    for name in ("num_key_value_heads", "swa_num_key_value_heads"):
        # As many as heads, where the default has as many: latent attention counts on it.
        if name in changed and values[name] == heads:
            changed[name] = _attention_heads(changed) or heads
    return {name: value for name, value in changed.items() if values[name] != value}


def layers_kept(lists: list[list[Any]]) -> list[int]:
    """Return which layers represent all: the first of every kind, as distinguished by all the
    `lists` together; at least two and at most four."""
    kinds = [repr(kind) for kind in zip(*lists, strict=True)]
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:_MOST_LAYERS]
    rest = (index for index in range(len(kinds)) if index not in first)
    while len(first) < min(2, len(kinds)):
        first.append(next(rest))
    return sorted(first)


def _attention_heads(values: Mapping[str, Any]) -> Any:
    return next((values[n] for n in ("num_attention_heads", "n_head") if n in values), None)


def _per_layer(values: Mapping[str, Any]) -> list[str]:
    """Return the fields with one entry per layer: lists as long as there are layers."""
    count = next((values[name] for name in LAYER_COUNTS if name in values), None)
    return [
        name
        for name, value in values.items()
        if isinstance(value, list)
        and (len(value) == count if isinstance(count, int) else name == "layer_types")
        and len(value) > 1
    ]


def _is_random(name: str) -> bool:
    return ("drop" in name and "path_" not in name) or "jitter" in name or "noise" in name


def _token(name: str, value: Any) -> Any:
    """Return a token id inside the toy vocabulary, different from a batch's for special tokens."""
    if isinstance(value, list | tuple):
        return type(value)([_token(name, value[0])]) if value else value
    for part, token in _SPECIAL.items():
        if name.startswith(part):
            return token
    if not isinstance(value, int) or 0 <= value < VOCABULARY:
        return value
    # Different names give different ids, from the upper end that batches do not use.
    return VOCABULARY - 1 - sum(map(ord, name)) % 24
