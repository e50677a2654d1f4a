"""Draws ways to damage a folder of safetensors, which a reader must notice or tolerate.

No way changes the numbers in a tensor's data, as no reader could notice this.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

SAME_SIZE = {
    **{"F32": "I32", "I32": "F32", "I64": "F64", "BF16": "I16", "F16": "I16"},
    **{"F8_E4M3": "U8", "U8": "F8_E4M3", "I8": "U8", "F8_E8M0": "I8", "F64": "I64"},
}
"""For each dtype one that as many bytes could be."""


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def drawn_tensor(draw: Draw, folder: Path) -> tuple[Path, dict[str, Any], bytes, str]:
    file = draw(st.sampled_from(shards(folder)))
    header, data = parts(file)
    names = sorted(name for name in header if name != "__metadata__")
    return file, header, data, draw(st.sampled_from(names))


def cut(draw: Draw, folder: Path) -> None:
    file = draw(st.sampled_from(shards(folder)))
    content = file.read_bytes()
    file.write_bytes(content[: draw(st.integers(0, len(content) - 1))])


def lengthen(draw: Draw, folder: Path) -> None:
    file = draw(st.sampled_from(shards(folder)))
    file.write_bytes(file.read_bytes() + draw(st.binary(min_size=1, max_size=9)))


def remove(draw: Draw, folder: Path) -> None:
    draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.is_file()))).unlink()


def exchange(draw: Draw, folder: Path) -> None:
    first, last = shards(folder)[0], shards(folder)[-1]
    contents = first.read_bytes(), last.read_bytes()
    last.write_bytes(contents[0])
    first.write_bytes(contents[1])


def change_length(draw: Draw, folder: Path) -> None:
    """Change one byte of the header's length."""
    file = draw(st.sampled_from(shards(folder)))
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, 7))
    content[place] = draw(st.integers(0, 255))
    file.write_bytes(bytes(content))


def relabel(draw: Draw, folder: Path) -> None:
    """Give a tensor another dtype of the same size, a transposed or flat shape, or another name."""
    file, header, data, name = drawn_tensor(draw, folder)
    entry = header[name]
    kind = draw(st.sampled_from(["dtype", "transposed", "flat", "name"]))
    if kind == "dtype":
        entry["dtype"] = SAME_SIZE.get(entry["dtype"], "U8")
    elif kind == "transposed":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "flat":
        count = 1
        for size in entry["shape"]:
            count *= size
        entry["shape"] = [count]
    else:
        header[f"{name}_"] = header.pop(name)
    write(file, header, data)


def move_in_index(draw: Draw, folder: Path) -> None:
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        places = content["weight_map"]
        name = draw(st.sampled_from(sorted(places)))
        there = ["nowhere.safetensors", "../elsewhere.safetensors", 3, None, "model.bin"]
        place = draw(st.sampled_from([*there, *sorted(set(places.values()))]))
        if place is None:
            del places[name]
        else:
            places[name] = place
        index.write_text(json.dumps(content))


def break_json(draw: Draw, folder: Path) -> None:
    file = draw(st.sampled_from(sorted(folder.glob("*.json"))))
    text = file.read_text()
    file.write_text(text[: draw(st.integers(0, len(text) - 1))])


def change_setting(draw: Draw, folder: Path) -> None:
    """Change a size or a word in config.json's `quantization_config`, at any depth."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    places = list(_leaves(config["quantization_config"]))
    if places:
        holder, key = draw(st.sampled_from(places))
        odd = [-1, 0, 3, 7, 1000] if isinstance(holder[key], int) else ["unknown", None, 5]
        holder[key] = draw(st.sampled_from(odd))
    file.write_text(json.dumps(config))


def _leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the places of numbers and words, except booleans."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in pairs:
        if isinstance(each, (dict, list)):
            yield from _leaves(each)
        elif isinstance(each, (int, str)) and not isinstance(each, bool):
            yield value, key


WAYS: tuple[Callable[[Draw, Path], None], ...] = (
    *(cut, lengthen, remove, exchange, change_length, relabel, relabel, relabel),
    *(move_in_index, break_json, change_setting, change_setting),
)
