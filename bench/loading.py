"""Peak memory and time of packing while loading, beside bitsandbytes, on a 1.1B-shaped checkpoint.

Writes random bfloat16 weights of TinyLlama-1.1B's shape in eight shards and loads them as NF4 with
double quantisation, in separate processes, in turn. The peak is the growth of RssAnon, the memory
that belongs to no file, during loading; the limit is the packed model and the largest tensor that
stays in 16 bits. `python -m bench.loading --rounds 2`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


def write_checkpoint(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    shape: Any = _SHAPE | {"num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**shape))
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // (_SHARDS - 1))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, default=_SHAPE["num_hidden_layers"])
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.contender:
        print(json.dumps(load(given.contender, given.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="qlora_compile-") as temporary:
        folder = Path(temporary)
        write_checkpoint(folder, given.layers)
        print(f"{len(list(folder.glob('*.safetensors')))} shards")
        for _ in range(given.rounds):
            for contender in CONTENDERS:
                part = folder / "packed" if contender.endswith("folder") else folder
                command = [sys.executable, "-m", "bench.loading", "--contender", contender]
                run = subprocess.run(
                    [*command, "--folder", str(part)], capture_output=True, text=True, check=True
                )
                told = json.loads(run.stdout.splitlines()[-1])
                limit = told["packed"] + told["largest"]
                print(
                    f"{contender}: {told['seconds']:.1f} s, peak {told['peak'] / 1e6:.0f} MB = "
                    f"{told['peak'] / limit:.3f} of packed + largest tensor ({limit / 1e6:.0f} MB)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
