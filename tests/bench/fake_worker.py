"""A contender's process that computes nothing: it answers, or fails as its name says."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    name = json.loads(sys.stdin.readline())["contender"]
    if name == "cannot be built":
        sys.exit("ImportError: no accelerator")
    print(json.dumps({"seconds": 1.0, "path": sys.path}), flush=True)
    for count, line in enumerate(sys.stdin):
        what, _ = json.loads(line)
        if (name == "hangs" and what == "step") or (name == "hangs later" and count > 3):
            time.sleep(600)
        if name == "breaks" and count > 3:
            sys.exit("RuntimeError: an illegal memory access")
        print(json.dumps({"loss": 9.0 if name == "wrong" else 3.0, "seconds": 0.5}), flush=True)


if __name__ == "__main__":
    main()
