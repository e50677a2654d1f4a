"""What can be wrong with values that a format stores."""

from __future__ import annotations

from qlora_compile.errors import QloraCompileError


class AbsmaxOverflowError(QloraCompileError, ValueError):
    template = (
        "{site}: the mean of the block maxima (largest {largest}) exceeds float32, so they cannot "
        "be quantised a second time; pass double_quantize=False or repair the checkpoint"
    )
