"""
Loading and saving checkpoints: seconds and peak memory, beside transformers.

    python benchmarks/loading.py [--sizes 10,50,135]

For random LLaMA models of about so many million parameters, stored in bfloat16 in one file, each
measured in a process of its own: the seconds that loading takes, and how far the resident memory
rises above what it was before, as a multiple of the model's own size (1.00 is the least that is
possible; 2.00 would be a second copy).  The files were written just before, so both tools find them
in the page cache; both must read the same weights.  The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# million parameters -> hidden size, layers (MLP three times as wide, vocabulary of 49,152 as in
# SmolLM2, tied); 135 has SmolLM2-135M's width and depth
SHAPES = {10: (192, 4), 50: (448, 10), 135: (576, 30)}


def write_model(folder: Path, hidden: int, layers: int) -> None:
    """A random checkpoint in bfloat16, with a tokenizer of single bytes."""
    import torch

    from nanolaser.checkpoint import save_pretrained
    from nanolaser.model import CausalLM, ModelConfig
    from nanolaser.tiny.__main__ import init_weights
    from nanolaser.tokenizer import Tokenizer
    from tests.conftest import write_tokenizer

    config = ModelConfig(
        model_type="llama", vocab_size=49_152, hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=1,
        head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(config).bfloat16()
    model = init_weights(model.to_empty(device="cpu"), 0)
    with torch.no_grad():  # init_weights leaves the norms as they were made: here, unset memory
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
    write_tokenizer(folder / "tokenizer")
    save_pretrained(model, Tokenizer.from_folder(folder / "tokenizer"), folder / "model")


def memory(field: str) -> int:
    """Bytes, VmRSS (resident now) or VmHWM (its peak); ru_maxrss would count the parent's too."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(tool: str, folder: str, small: str, dtype: str) -> dict:
    """Load in this process; {"seconds", "bytes" of the weights, "ratio": peak rise / bytes}."""
    import torch

    def load(path):
        if tool == "nanolaser":
            from nanolaser.checkpoint import load_pretrained

            return load_pretrained(path, dtype=dtype)[0]
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))

    load(small)  # imports, thread pools and allocators are not the checkpoint's
    before, began = memory("VmRSS"), time.perf_counter()
    model = load(folder)
    # touch every weight: a tensor that is only mapped has cost nothing so far
    checksum = sum(float(p.detach().sum()) for p in model.parameters())
    seconds, size = time.perf_counter() - began, sum(p.nbytes for p in model.parameters())
    ratio = (memory("VmHWM") - before) / size
    return {"seconds": seconds, "bytes": size, "ratio": ratio, "checksum": checksum}


def main() -> None:
    """Write the models, measure each tool in fresh processes, print table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", default="10,50,135", help="million parameters (10, 50, 135)")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(*args.measure)))
    rows = []
    print(f"{'parameters':>10} {'dtype':>9} {'tool':>13} {'seconds':>8} {'peak / size':>12}")
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "small", 64, 1)
        small = f"{place}/small/model"
        for size in map(int, args.sizes.split(",")):
            write_model(Path(place) / str(size), *SHAPES[size])
            for dtype in ("bfloat16", "float32"):
                for tool in ("nanolaser", "transformers"):
                    job = [tool, f"{place}/{size}/model", small, dtype]
                    result = subprocess.run(
                        [sys.executable, __file__, "--measure", *job],
                        capture_output=True, text=True, check=True,
                    )  # fmt: skip
                    row = json.loads(result.stdout.splitlines()[-1])
                    rows.append({"parameters": f"{size}M", "dtype": dtype, "tool": tool, **row})
                    if tool == "transformers" and row["checksum"] != rows[-2]["checksum"]:
                        sys.exit(f"{size}M {dtype}: the two tools read different weights")
                    figures = f"{row['seconds']:8.2f} {row['ratio']:12.2f}"
                    print(f"{size:>9}M {dtype:>9} {tool:>13} {figures}")
    print(json.dumps({"benchmark": "loading", "rows": rows}))


if __name__ == "__main__":
    main()
