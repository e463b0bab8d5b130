"""
Is the memory plan right?  Peak resident memory of real training steps, beside what
nanolaser/memory.py computes for them from the model's shape.

    python benchmarks/memory.py            # three sizes, two variants; minutes on one core
    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/memory.py   # malloc keeps nothing freed

Each case runs in a process of its own: two steps of the trainer's own functions (sample, update
in several micro-batches, AdamW) on a random model.  The first step has no optimizer state yet, so
the second is the one that counts.  Linux only: peaks are the kernel's count of resident pages.
The last line is one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

from nanolaser.scale import plan as memory  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM, ModelConfig  # noqa: E402

GOAL = 0.15  # of the measured peak


def _shape(C: int, I: int, L: int, H: int, K: int, V: int) -> ModelConfig:  # noqa: E741
    """A random model's shape, tied as the small Qwen models are."""
    tied = dict(tie_word_embeddings=True, attention_bias=True)
    return ModelConfig("qwen2", V, C, I, L, H, K, C // H, **tied)


SIZES = {
    "10M": _shape(256, 768, 8, 4, 2, 16_384),
    "50M": _shape(512, 1536, 12, 8, 4, 24_576),
    "135M": memory.SHAPES["smollm2-135m"],
}
CASES = {  # name: (size, dtype, gradient checkpointing)
    "10M": ("10M", "float32", False),
    "50M": ("50M", "float32", False),
    "135M": ("135M", "float32", False),
    "50M checkpointing": ("50M", "float32", True),
    "50M bfloat16": ("50M", "bfloat16", False),
}


@dataclass
class Options:
    """Compare planned with measured peak memory."""

    case: str | None = option(None, "one of the cases (default: each, in its own process)")
    problems: int = option(4, "P", min=1)
    group_size: int = option(4, "G", min=2)
    prompt_tokens: int = option(64, "of each prompt", min=1)
    max_new_tokens: int = option(64, "of each solution", min=1)
    micro_batch_tokens: int = option(1024, "padded tokens of a micro-batch", min=1)


class _Tokenizer:
    """What the sampler asks of a tokenizer.  A stop token that is never drawn makes every rollout
    as long as allowed: the plan speaks of the longest."""

    stop_ids, z_c_id = (-1,), 1

    def __init__(self, size: int):
        self.size = size


def planned(o: Options, case: str, rates: memory.Rates) -> memory.Plan:
    """The plan of one case, its settings taken as they are."""
    size, dtype, checkpointing = CASES[case]
    work = memory.Workload(
        o.problems, o.group_size, o.prompt_tokens, o.max_new_tokens, 1, o.prompt_tokens,
        o.max_new_tokens,
    )  # fmt: skip
    return memory.plan(
        SIZES[size], device_bytes=memory.available_bytes("cpu"), dtype=getattr(torch, dtype),
        name=case, work=work, rates=rates, choose=False,
        wanted=memory.Settings(o.micro_batch_tokens, checkpointing),
    )  # fmt: skip


def run_case(o: Options, case: str) -> dict:
    """Train two steps; {"phases": peak resident bytes while sampling, updating, stepping}."""
    from nanolaser import grpo, sampler

    size, dtype, checkpointing = CASES[case]
    config = SIZES[size]
    model = CausalLM(config).to(getattr(torch, dtype)).init_weights(0)
    model.gradient_checkpointing = checkpointing
    optimizer, tokenizer = grpo.Optimizer(model, 1e-5, 0.0), _Tokenizer(config.vocab_size)
    prompts = [[5 + i] * o.prompt_tokens for i in range(o.problems)]
    for step in range(2):
        seconds = [time.perf_counter()]
        peaks = [_reset_peak()]
        rollouts = sampler.generate(
            model, tokenizer, prompts, n=o.group_size, max_new_tokens=o.max_new_tokens, seed=step
        )
        peaks.append(_reset_peak()), seconds.append(time.perf_counter())
        for i, r in enumerate(rollouts):
            r.r_v, r.finished = float(i % 2), False
        advantages, weights = torch.ones(len(rollouts)), torch.zeros(len(rollouts))
        advantages[::2] = -1.0
        grpo.accumulate_gradients(
            model, rollouts, advantages, weights, grpo.Loss(), o.micro_batch_tokens
        )
        torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        peaks.append(_reset_peak()), seconds.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(_reset_peak()), seconds.append(time.perf_counter())
    spent = [after - before for before, after in zip(seconds, seconds[1:])]
    return {"phases": peaks[1:], "seconds": spent}


def _reset_peak() -> int:
    """Peak resident bytes since the last call (Linux: VmHWM, which writing 5 sets back)."""
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024


def main() -> int:
    """Run every case, print the table and the JSON line."""
    o, given = parse_args(Options)
    if o.case:
        if o.case not in CASES:
            raise ValueError(f"--case {o.case}: one of {', '.join(CASES)}")
        print(json.dumps(run_case(o, o.case)))
        return 0
    sizes = [f"--{name.replace('_', '-')}={getattr(o, name)}" for name in given]
    rates, results = memory.measure_rates(), {}
    print(f"{'MiB':<20}{'parameters':>12} |{'sample':>16}{'update':>16}{'step':>16} |{'peak':>16}")
    for case in CASES:
        p = planned(o, case, rates)
        command = [sys.executable, __file__, f"--case={case}", *sizes]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            raise ValueError(f"{case}: {out.stderr.strip()[-300:]}")
        m = json.loads(out.stdout.splitlines()[-1])
        measured, error = max(m["phases"]), p.peak_bytes / max(m["phases"]) - 1
        pairs = [*zip(p.totals, m["phases"]), (p.peak_bytes, measured)]
        cells = [f"{a / 2**20:>8,.0f}/{b / 2**20:<7,.0f}" for a, b in pairs]
        count, phases = memory.parameters(p.config), "".join(cells[:3])
        print(f"{case:<20}{count:>12,} |{phases} |{cells[3]} {error:+6.1%}", flush=True)
        results[case] = {
            "parameters": count, "planned_bytes": p.peak_bytes, "measured_bytes": measured,
            "error": error, "planned_phases": p.totals, "measured_phases": m["phases"],
            "planned_seconds": p.seconds, "measured_seconds": m["seconds"],
        }  # fmt: skip
    print("each cell: planned/measured; a phase's measured peak holds what the one before left")
    worst = max(abs(r["error"]) for r in results.values())
    print(f"largest error {worst:.1%}; goal {GOAL:.0%}: {'met' if worst <= GOAL else 'MISSED'}")
    print(json.dumps({"benchmark": "memory", "goal": GOAL, "worst": worst, "cases": results}))
    return 0


if __name__ == "__main__":
    main_guard(main)
