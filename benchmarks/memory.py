"""
Is the memory plan right?  Peak resident memory of real training steps, beside what
nanolaser/scale/plan.py computes for them from the model's shape.

    python benchmarks/memory.py            # three sizes, three variants; minutes on one core

Each case runs in a process of its own: two steps of the trainer's own functions (sample, update
in several micro-batches, AdamW) on a random model.  The first step has no optimizer state yet, so
the second is the one that counts.  Linux only: peaks are the kernel's count of resident pages.

And each case runs twice.  By default glibc's heap keeps freed blocks of up to 32 MB, and with them
holes that nothing fits into; told to give every large block back (MALLOC_MMAP_THRESHOLD_), it shows
what the tensors take, which is what the plan counts.  The goal is about that one; the other, which
a user meets, stands beside it.  The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

from nanolaser import grpo, sampler  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM, ModelConfig  # noqa: E402
from nanolaser.scale import plan as planning  # noqa: E402
from nanolaser.scale.optimizer import Optimizer  # noqa: E402
from nanolaser.tiny.__main__ import init_weights  # noqa: E402

GOAL = 0.10  # of the measured peak


def _shape(C: int, I: int, L: int, H: int, K: int, V: int) -> ModelConfig:  # noqa: E741
    """A random model's shape, tied as the small Qwen models are."""
    tied = dict(tie_word_embeddings=True, attention_bias=True)
    return ModelConfig("qwen2", V, C, I, L, H, K, C // H, **tied)


SIZES = {
    "10M": _shape(256, 768, 8, 4, 2, 16_384),
    "50M": _shape(512, 1536, 12, 8, 4, 24_576),
    "135M": planning.SHAPES["smollm2-135m"],
}
CASES = {  # name: (size, dtype, gradient checkpointing, solutions per problem)
    "10M": ("10M", "float32", False, 4),
    "50M": ("50M", "float32", False, 4),
    "135M": ("135M", "float32", False, 4),
    "50M checkpointing": ("50M", "float32", True, 4),
    "50M bfloat16": ("50M", "bfloat16", False, 4),
    # so many that gradients are summed in fp32 before the last one: see scale/optimizer.py
    "50M bfloat16, 17 micro-batches": ("50M", "bfloat16", False, 34),
}


@dataclass
class Options:
    """Compare planned with measured peak memory."""

    case: str | None = option(None, "one of the cases (default: each, in its own process)")
    problems: int = option(4, "P", min=1)
    prompt_tokens: int = option(64, "of each prompt", min=1)
    max_new_tokens: int = option(64, "of each solution", min=1)
    micro_batch_tokens: int = option(1024, "padded tokens of a micro-batch", min=1)


class _Tokenizer:
    """What the sampler asks of a tokenizer.  A stop token that is never drawn makes every rollout
    as long as allowed: the plan speaks of the longest."""

    stop_ids, z_c_id = (-1,), 1

    def __init__(self, size: int):
        self.size = size


def planned(o: Options, case: str) -> planning.Plan:
    """The plan of one case, its settings taken as they are if this machine has the memory."""
    size, dtype, checkpointing, n = CASES[case]
    there = planning.available_bytes("cpu")
    return planning.plan(
        SIZES[size], device_bytes=there, host_bytes=there, dtype=getattr(torch, dtype), name=case,
        work=planning.Workload(o.problems, n, o.prompt_tokens, o.max_new_tokens),
        wanted=planning.Settings(o.micro_batch_tokens, checkpointing),
    )  # fmt: skip


def run_case(o: Options, case: str) -> list[int]:
    """Train two steps; peak resident bytes of the second while sampling, updating, stepping."""
    size, dtype, checkpointing, n = CASES[case]
    config = SIZES[size]
    model = init_weights(CausalLM(config).to(getattr(torch, dtype)), 0)
    model.gradient_checkpointing = checkpointing
    optimizer, tokenizer = Optimizer(model, 1e-5, 0.0), _Tokenizer(config.vocab_size)
    prompts = [[5 + i] * o.prompt_tokens for i in range(o.problems)]
    for step in range(2):
        _reset_peak()
        rollouts = sampler.generate(
            model, tokenizer, prompts, n=n, max_new_tokens=o.max_new_tokens, seed=step
        )
        peaks = [_reset_peak()]
        for i, r in enumerate(rollouts):
            r.r_v, r.finished = float(i % 2), False
        advantages, weights = torch.ones(len(rollouts)), torch.zeros(len(rollouts))
        advantages[::2] = -1.0
        grpo.accumulate_gradients(
            model, rollouts, advantages, weights, grpo.Loss(), o.micro_batch_tokens,
            optimizer=optimizer,
        )  # fmt: skip
        peaks.append(_reset_peak())
        optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(_reset_peak())
    return peaks


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
    sizes, results = [f"--{name.replace('_', '-')}={getattr(o, name)}" for name in given], {}
    print(f"{'MiB':<32}{'parameters':>12} |{'sample':>13}{'update':>13}{'step':>13} |{'peak':>13}")
    for case in CASES:
        p = planned(o, case)
        command = [sys.executable, __file__, f"--case={case}", *sizes]
        runs = []
        for setting in ({}, {"MALLOC_MMAP_THRESHOLD_": "131072"}):
            out = subprocess.run(command, capture_output=True, text=True, env=os.environ | setting)
            if out.returncode:
                raise ValueError(f"{case}: {out.stderr.strip()[-300:]}")
            runs.append(json.loads(out.stdout.splitlines()[-1]))
        with_holes, phases = max(runs[0]), runs[1]
        peak, count = max(phases), planning.parameters(p.config)
        pairs = [*zip(p.totals, phases), (p.peak_bytes, peak)]
        cells = [f"{a / 2**20:>7,.0f}/{b / 2**20:<5,.0f}" for a, b in pairs]
        error = p.peak_bytes / peak - 1
        print(f"{case:<32}{count:>12,} |{''.join(cells[:3])} |{cells[3]} {error:+6.1%}; by default "
              f"{with_holes / 2**20:,.0f} {p.peak_bytes / with_holes - 1:+.1%}", flush=True)
        results[case] = {
            "parameters": count, "planned_bytes": p.peak_bytes, "measured_bytes": peak,
            "error": error, "planned_phases": p.totals, "measured_phases": phases,
            "measured_by_default": with_holes,
        }  # fmt: skip
    print("each cell: planned/measured; a phase's measured peak holds what the one before left")
    worst = max(abs(r["error"]) for r in results.values())
    print(f"largest error {worst:.1%}; goal {GOAL:.0%}: {'met' if worst <= GOAL else 'MISSED'}")
    print(json.dumps({"benchmark": "memory", "goal": GOAL, "worst": worst, "cases": results}))
    return 0


if __name__ == "__main__":
    main_guard(main)
