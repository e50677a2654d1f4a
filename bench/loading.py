"""Peak memory and time of packing while loading, beside bitsandbytes, on a 1.1B-shaped checkpoint.

Writes random bfloat16 weights of TinyLlama-1.1B's shape in eight shards and loads them as NF4 with
double quantisation, in separate processes, in turn. The peak is the growth of RssAnon, the memory
that belongs to no file, during loading; the limit is the packed model and the largest tensor that
stays in 16 bits. `python -m bench.loading --rounds 2` writes bench/results/loading.*.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.measured_on import in_words, measured_on

RESULTS = Path(__file__).parent / "results" / "loading"
CONTENDERS = ("ours", "bitsandbytes", "ours, packed folder")
_SHARDS = 8
_SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def anonymous_bytes() -> int:
    """Return RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Peak:
    """The largest RssAnon while the context is open, sampled each millisecond."""

    def __enter__(self) -> Peak:
        self.bytes, self._open = 0, True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write a model and return the number of its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    shape: Any = _SHAPE | {"num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=int(size / (_SHARDS - 0.5)))
    return model.num_parameters()


def load(contender: str, folder: Path) -> dict[str, Any]:
    """Load once; return seconds, and bytes of the peak, of the packed model and of the largest
    tensor."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import qlora_compile

    qlora_compile.QloraCompileConfig("nf4")
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if contender == "ours":
        options["quantization_config"] = qlora_compile.QloraCompileConfig("nf4")
        from qlora_compile import sites  # so that its imports are not counted

        assert sites
    elif contender == "bitsandbytes":
        import bitsandbytes

        assert bitsandbytes
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    before = anonymous_bytes()
    started = time.perf_counter()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    seconds = time.perf_counter() - started
    if contender == "ours" and not (folder / "packed").exists():
        qlora_compile.save(model, folder / "packed", stored_as="qlora_compile")
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return {
        "seconds": seconds,
        "peak": peak.bytes - before,
        "packed": sum(t.nbytes for t in tensors),
        "largest": max(t.nbytes for t in tensors),
    }


def measure(contender: str, folder: Path, seconds: float) -> dict[str, Any] | None:
    """Load once in a process of its own; None if that has not ended after so many seconds."""
    command = [sys.executable, "-m", "bench.loading", "--contender", contender]
    try:
        run = subprocess.run(
            [*command, "--folder", str(folder)],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(run.stdout.splitlines()[-1])


def row(contender: str, found: list[dict[str, Any] | None], timeout: float) -> str:
    """One line of the table: the medians of the rounds."""
    ended = [each for each in found if each is not None]
    if not ended:
        return f"| {contender} | more than {timeout:.0f} | | | |"
    seconds, peak = (statistics.median(each[key] for each in ended) for key in ("seconds", "peak"))
    limit = ended[0]["packed"] + ended[0]["largest"]
    cells = (f"{seconds:.1f}", f"{peak / 1e6:.0f}", f"{limit / 1e6:.0f}", f"{peak / limit:.2f}")
    return f"| {contender} | {' | '.join(cells)} |"


def write(results: dict[str, Any]) -> None:
    parts = [
        "Medians; MB of 10⁶ bytes. The peak is of RssAnon above that before loading, the limit the "
        "packed model and the largest tensor that stays in 16 bits: `python -m bench.loading`."
    ]
    for name, each in results.items():
        rows = [row(c, found, each["timeout"]) for c, found in each["loads"].items()]
        rows = ["| loaded by | seconds | peak | limit | peak / limit |", "|---" * 5 + "|", *rows]
        parts += [f"## {name}, in turn, rounds: {each['rounds']}", "\n".join(rows)]
        parts += [f"{each['conditions']} {in_words(each['measured_on'])}.".strip()]
    RESULTS.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=_SHAPE["num_hidden_layers"])
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds of one load")
    parser.add_argument("--conditions", default="", help="a sentence for the results")
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.contender:
        print(json.dumps(load(given.contender, given.folder)))
        return
    loads: dict[str, list[dict[str, Any] | None]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as temporary:
        folder = Path(temporary)
        parameters = write_checkpoint(folder, given.layers)
        shards = len(list(folder.glob("*.safetensors")))
        # Not counted: the first load of a machine compiles C++.
        measure(CONTENDERS[0], folder, given.timeout)
        for _ in range(given.rounds):
            for contender, found in loads.items():
                part = folder / "packed" if contender.endswith("folder") else folder
                found.append(measure(contender, part, given.timeout))
                print(row(contender, found[-1:], given.timeout), flush=True)
    path = RESULTS.with_suffix(".json")
    results = json.loads(path.read_text()) if path.exists() else {}
    results[f"{parameters / 1e9:.2f}B parameters in {shards} shards"] = {
        "rounds": given.rounds,
        "timeout": given.timeout,
        "conditions": given.conditions,
        "measured_on": measured_on(),
        "loads": loads,
    }
    write(results)


if __name__ == "__main__":
    main()
