"""The model card of a packed model's folder."""

from __future__ import annotations

from collections import Counter

from qlora_compile.hf.saving.base_tensors import BaseTensors
from qlora_compile.hf.saving.folders.folder_format import FolderFormat
from qlora_compile.kernels.registry import format_named

CARD = "README.md"

_TEXT = """---
library_name: transformers
tags:
- qlora_compile
---

# {name}, packed

The weights of {count} layers are stored packed by
[qlora_compile](https://pypi.org/project/qlora-compile/):

{formats}

To load this folder, use {reader}:

```python
{code}
```
"""


def model_card(tensors: BaseTensors, kind: FolderFormat) -> str:
    """Return the text of a README.md that says how to load the folder."""
    labels = Counter(
        format_named(packed.format).label(packed.layout) for packed in tensors.packed.values()
    )
    model = type(tensors.model).__name__
    return _TEXT.format(
        name=tensors.model.config.name_or_path or model,
        count=len(tensors.packed),
        formats="\n".join(f"- {label}: {count}" for label, count in labels.items()),
        reader=kind.reader,
        code=kind.code.format(model=model),
    )
