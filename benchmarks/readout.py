"""
What the readout costs.

    python benchmarks/readout.py                       # one thread; about ten minutes
    python benchmarks/readout.py --tokens 512 --runs 1 # a quick look

1.  The log-probs of B * T tokens and their gradients, at the width of Qwen2.5-0.5B (C = 896,
    V = 151,936): plain torch (logits, log_softmax, gather) beside nanolaser/readout.py.  Peak
    memory is what the process holds beyond the inputs and beyond gradients that are already
    there, as they are from the second micro-batch on.
2.  Three ways to ask a model about N solutions that it has just sampled: z_c in the batch that
    samples them; z_c by a second forward pass over problem and solution; a judgement in words.

Seconds are the process's own (CPU time, one thread), so that other work on the machine does not
enter; medians of alternating runs.  Linux only.  The last line is one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

from nanolaser import judge, load_pretrained, sampler, scoring  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.model import CausalLM, ModelConfig  # noqa: E402
from nanolaser.problems import made_up_problems  # noqa: E402
from nanolaser.readout import loss_backward, token_logprobs  # noqa: E402
from nanolaser.tiny.__main__ import init_weights  # noqa: E402

GOALS = {"memory": 1 / 10, "time": 1.05}  # of plain torch


@dataclass
class Options:
    """Measure the readout's time and memory."""

    tokens: int = option(2048, "log-probs at a time, B * T", min=1)
    hidden: int = option(896, "C", min=1)
    vocabulary: int = option(151_936, "V", min=2)
    runs: int = option(3, "of each way, alternating", min=1)
    problems: int = option(8, "of the second part", min=1)
    group_size: int = option(4, "solutions of each", min=1)
    judgement_tokens: int = option(64, "that the random model writes about a solution", min=1)


def resident(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (most, since it was last set back)."""
    status = Path("/proc/self/status").read_text()
    return int(next(s for s in status.splitlines() if s.startswith(field)).split()[1]) * 1024


def measure(function: Callable[[], object]) -> tuple[float, int]:
    """(seconds, most bytes held beyond what was held before) of one call."""
    # What earlier work has freed goes back to the system, or taking it again would not show.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    before, began = resident("VmRSS"), time.process_time()
    function()
    return time.process_time() - began, resident("VmHWM") - before


# ---------------------------------------------------------------------------------------------
# 1. log-probs and gradients


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> None:
    """As one writes it without thinking of memory: three products and a table of (N, V)."""
    table = torch.log_softmax((hidden @ weight.T).float(), -1)
    logprobs = table.gather(1, targets[:, None])[:, 0]
    del table  # kept by autograd, once, and no longer by us
    (logprobs * upstream).sum().backward()


def recomputed(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> None:
    """Our differentiable function: four products."""
    (token_logprobs(hidden, weight, targets) * upstream).sum().backward()


def merged(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> None:
    """What training uses: the gradient made while the block of logits lies there."""
    loss_backward(hidden, weight, targets, lambda x, rows: (x * upstream[rows]).sum())


WAYS = {"plain torch": plain, "token_logprobs": recomputed, "loss_backward": merged}


def logprobs(o: Options) -> dict:
    """Time and peak memory of each way."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(o.tokens, o.hidden, generator=g)
    # logits with a standard deviation of 3 nats, as a trained model's are
    weight = torch.randn(o.vocabulary, o.hidden, generator=g).mul_(3 / o.hidden**0.5)
    targets = torch.randint(o.vocabulary, (o.tokens,), generator=g)
    upstream = torch.randn(o.tokens, generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    hidden.grad, weight.grad = (torch.full_like(x, 0.0) for x in (hidden, weight))
    runs: dict[str, list] = {name: [] for name in WAYS}
    gradients = {}
    for _ in range(o.runs):
        for name, way in WAYS.items():
            hidden.grad.zero_(), weight.grad.zero_()
            runs[name].append(measure(lambda: way(hidden, weight, targets, upstream)))
            gradients[name] = hidden.grad.norm().item(), weight.grad.norm().item()
    print(f"{o.tokens} tokens, C = {o.hidden}, V = {o.vocabulary:,}; {o.runs} alternating runs")
    print(f"{'':<16}{'seconds':>9}{'of plain':>10}{'peak MiB':>10}{'of plain':>10}")
    result, base = {}, None
    for name, pairs in runs.items():
        seconds, peak = (statistics.median(x) for x in zip(*pairs))
        base = base or (seconds, peak)
        result[name] = {"seconds": seconds, "time_ratio": seconds / base[0], "peak_bytes": peak,
                        "memory_ratio": peak / base[1]}
        print(f"{name:<16}{seconds:9.2f}{seconds / base[0]:10.2f}{peak / 2**20:10.0f}"
              f"{peak / base[1]:10.3f}", flush=True)
        for mine, theirs in zip(gradients[name], gradients["plain torch"]):
            assert abs(mine / theirs - 1) < 1e-4, f"{name}: gradient norm {mine}, plain {theirs}"
    best = result["loss_backward"]
    for what, goal in GOALS.items():
        met = "met" if best[f"{what}_ratio"] <= goal else "MISSED"
        print(f"{what}: {best[f'{what}_ratio']:.3f} of plain torch; goal {goal:.2f}: {met}")
    return result


# ---------------------------------------------------------------------------------------------
# 2. three ways to ask


class _Endless:
    """What the sampler asks of a tokenizer; no row ever ends before its limit."""

    stop_ids, z_c_id = (-1,), 1

    def __init__(self, size: int):
        self.size = size


def step_seconds(model: CausalLM, size: int, prompts: list, n: int, length: int) -> float:
    """What one more token for every row costs the sampler, at `length` tokens: the slope between
    rows half as long again and half as short."""
    seconds = []
    for tokens in (length - length // 2, length + length // 2):
        began = time.process_time()
        sampler.generate(model, _Endless(size), prompts, n=n, max_new_tokens=tokens)
        seconds.append(time.process_time() - began)
    return (seconds[1] - seconds[0]) / (2 * (length // 2))


def embedded(o: Options) -> tuple:
    """The embedded model, its own solutions and its own question to itself."""
    model, tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
    problems = made_up_problems(o.problems, 0, "test")
    rollouts = sampler.generate(
        model, tokenizer, [p.problem for p in problems], n=o.group_size, max_new_tokens=96
    )
    rollouts = [r for r in rollouts if r.finished]
    rows = [
        {"problem": problems[r.prompt_id].problem, "response": None,
         "prompt_token_ids": r.prompt_tokens, "response_token_ids": r.response_tokens}
        for r in rollouts
    ]  # fmt: skip
    prompts = [judge.judgement_prompt(tokenizer, row) for row in rows]

    def ask() -> int:
        tokens = []
        judge.judge(model, tokenizer, rows, 32, 256, lambda _, x: tokens.append(x["tokens"]))
        return sum(tokens)

    return model, tokenizer.size, tokenizer.z_c_id, rollouts, prompts, ask


def random_90m(o: Options) -> tuple:
    """A random Qwen2 of 90M parameters; prompts, solutions and judgements of 64 tokens."""
    config = ModelConfig("qwen2", 32_000, 640, 1728, 16, 10, 2, 64, tie_word_embeddings=True,
                         attention_bias=True)  # fmt: skip
    model, tokenizer = init_weights(CausalLM(config), 0), _Endless(32_000)
    prompts = [[7 + i] * 64 for i in range(o.problems)]
    rollouts = sampler.generate(model, tokenizer, prompts, n=o.group_size, max_new_tokens=64)
    # the same conversation, and a question of 24 tokens
    asked = [r.prompt_tokens + r.response_tokens + [3] * 24 for r in rollouts]

    def ask() -> int:
        length = o.judgement_tokens
        judged = sampler.generate(model, tokenizer, asked, max_new_tokens=length, temperature=0.0)
        return sum(len(r.response_tokens) for r in judged)

    return model, tokenizer.size, tokenizer.z_c_id, rollouts, asked, ask


def asking(o: Options, name: str, prepared: tuple) -> dict:
    """Tokens and seconds of each way, for all solutions together."""
    model, size, z_c_id, rollouts, asked, ask = prepared
    x, y = ([getattr(r, f"{k}_tokens") for r in rollouts] for k in ("prompt", "response"))
    length = round(sum(map(len, y)) / len(y))
    seconds: dict[str, list] = {"readout": [], "second pass": [], "judgement": []}
    for _ in range(o.runs):
        # every row once: the prompts as many times as they have solutions
        seconds["readout"].append(step_seconds(model, size, x, 1, length))
        began = time.process_time()
        scoring.score(model, z_c_id, x, y)
        seconds["second pass"].append(time.process_time() - began)
        began = time.process_time()
        written = ask()
        seconds["judgement"].append(time.process_time() - began)
    read = sum(map(len, x)) + sum(map(len, y))
    tokens = {"readout": len(y), "second pass": read, "judgement": sum(map(len, asked)) + written}
    print(f"\n{name}: {len(y)} solutions of {length} tokens; a judgement of {written / len(y):.1f}")
    print(f"{'':<16}{'tokens':>9}{'seconds':>10}{'of readout':>12}")
    result = {}
    for way, values in seconds.items():
        spent = statistics.median(values)
        result[way] = {"tokens": tokens[way], "seconds": spent}
        ratio = spent / result["readout"]["seconds"]
        print(f"{way:<16}{tokens[way]:9,}{spent:10.3f}{ratio:12.1f}", flush=True)
    return {"solutions": len(y), "mean_tokens": length, **result}


def main() -> int:
    """Both parts, then the JSON line."""
    o, _ = parse_args(Options)
    torch.set_num_threads(1)
    results = {"logprobs": logprobs(o)}
    for name, prepare in (("embedded model", embedded), ("random 90M", random_90m)):
        results[name] = asking(o, name, prepare(o))
    print(json.dumps({"benchmark": "readout", "goals": GOALS, **results}))
    return 0


if __name__ == "__main__":
    main_guard(main)
