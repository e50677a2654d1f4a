"""Files as accidents leave them: what tests of readers draw."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.examples import examples

NASTY = (b"null", b"-1", b"1e999", b"NaN", b'""', b"[]", b"{}", b"\x00", b"\xff", b"[" * 2000)


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with one to three changes of bytes, ranges or values."""
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
    """As many examples in the long range, a twentieth in the suite."""
    return settings(
        max_examples=examples(count, 20),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
