"""Launches of a kernel that is compiled already."""

import json

from tests.bench.compiled import run


def test_only_what_is_compiled_anew_goes_through_tritons_jit() -> None:
    done = run("tests.kernels.launches_found")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launched"] == len(found["asked"])
    assert found["same"]
    known = {"again", "another number", "packed again"}
    assert found["asked"] == {name: int(name not in known) for name in found["asked"]}
