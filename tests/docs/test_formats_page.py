"""The pages about formats name every format, and the values that `optimize` takes by itself."""

import importlib.util
import re
from types import ModuleType

import pytest

from qlora_compile.adopt import format_options
from qlora_compile.kernels.formats.base import QuantFormat
from qlora_compile.kernels.formats.formats import FORMATS
from tests.docs.blocks import ROOT

# Other tests register formats of their own.
SHIPPED = [each for each in FORMATS if type(each).__module__.startswith("qlora_compile.")]


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    path = ROOT / "docs" / "generated.py"
    spec = importlib.util.spec_from_file_location("generated_pages", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_about_formats_lists_every_format() -> None:
    page = ROOT / "docs" / "how-it-works" / "formats-and-layouts.md"
    listed = re.findall(r"^\| `(\w+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [each.name for each in SHIPPED]


@pytest.mark.parametrize("quant_format", SHIPPED, ids=lambda each: each.name)
def test_bold_is_what_optimize_takes(quant_format: QuantFormat, generated: ModuleType) -> None:
    name = quant_format.name
    taken = format_options(name, block_size=None, double_quantize=True)
    layout = quant_format.layout((64, 64), **taken)
    for option in quant_format.options:
        (bold,) = re.findall(r"\*\*`(.+?)`\*\*", generated._values(quant_format, option))
        assert bold == repr(taken.get(option.name, layout.named.get(option.name, option.default)))
