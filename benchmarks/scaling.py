"""
What a step costs as it grows: seconds against the group's size, the solutions' length and the
model's width.

    python benchmarks/scaling.py                                      # about two minutes
    python benchmarks/scaling.py --axes group --runs 1 --most-rows 64 # a quick look
    python benchmarks/scaling.py --update update.svg                  # the update alone, far out

With --update FILE it is the update of one group of solutions, of one length, of the same model:
processor seconds and peak bytes for each token of a solution against the group's size (2 to 64),
the prompt's length (16 to 2,000) and the solutions' (16 to 4,000), beside the arithmetic, which
counts products of matrices and of attention; drawn as an SVG.

train.py's own step (sample, check, reward, update) on 16 arithmetic problems, with a random model
of the embedded one's shape.  Solutions end at lengths that are given, so that every row of the
table does exactly the work that it says: exponentially distributed around the mean, the longest
four times as long.  One axis changes at a time, from the row marked "base".

Seconds are the process's own (CPU time, one thread), so that other work on the machine does not
enter; medians of runs over the whole table, forth and back by turns.  The last line is one JSON
object.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1]))  # found without being installed

import train  # noqa: E402
from benchmarks.generate import forced, skewed_lengths  # noqa: E402
from nanolaser import grpo, load_pretrained, svg  # noqa: E402
from nanolaser.cli import main_guard, option, parse_args  # noqa: E402
from nanolaser.files import write_atomic  # noqa: E402
from nanolaser.model import CausalLM  # noqa: E402
from nanolaser.problems import made_up_problems  # noqa: E402
from nanolaser.rollout import Rollout  # noqa: E402
from nanolaser.scale.distributed import ALONE  # noqa: E402
from nanolaser.tiny.__main__ import init_weights  # noqa: E402

GOAL = 0.20  # by how much the cost of a token may differ between 32 and 512 rows
PROBLEMS = 16
# solutions of each problem, mean tokens of a solution, hidden size; the base stands in every axis
AXES = {"group": (2, 4, 8, 16, 32), "length": (16, 32, 64), "width": (64, 128, 256, 512)}
BASE = (4, 32, 128)


@dataclass
class Options:
    """Measure whole training steps of many sizes."""

    runs: int = option(3, "over the whole table", min=1)
    axes: tuple[str, ...] = option(tuple(AXES), "what grows", choices=tuple(AXES))
    most_rows: int = option(512, "larger steps are left out", min=PROBLEMS * BASE[0])
    update: str | None = option(None, "measure the update alone, and draw it here", metavar="FILE")


class Setting:
    """A row of the table: a model of its own, and train.py's step on it."""

    def __init__(self, axis: str, group_size: int, length: int, width: int):
        self.axis, self.group_size, self.length, self.width = axis, group_size, length, width
        tiny, self.tokenizer = load_pretrained("tiny", device="cpu", dtype="float32")
        self.tokenizer.c_ref = -12.0  # any number: what it costs does not depend on it
        heads = width // tiny.config.head_dim
        config = dataclasses.replace(
            tiny.config, hidden_size=width, intermediate_size=3 * width, num_attention_heads=heads,
            num_key_value_heads=heads // 2,
        )  # fmt: skip
        self.model = init_weights(CausalLM(config), 0)
        self.optimizer = grpo.Optimizer(self.model, 1e-6, 0.01)
        self.problems = made_up_problems(PROBLEMS, 0)
        self.lengths = skewed_lengths(self.rows, length, 4 * length)
        self.options = dataclasses.replace(
            train.Options(), steps=10**6, group_size=group_size,
            max_new_tokens=max(self.lengths), lr=1e-6, lr_warmup=0, reasoning_warmup=0,
            self_reward_warmup=0,
        )  # fmt: skip
        self.run = SimpleNamespace(
            o=self.options, model=self.model, tokenizer=self.tokenizer, optimizer=self.optimizer,
            stream=SimpleNamespace(at=lambda step, fresh: self.problems), world=ALONE,
            reward=None, reference=None,
        )  # fmt: skip
        self.taken: list[dict] = []

    @property
    def rows(self) -> int:
        """N, solutions of a step."""
        return PROBLEMS * self.group_size

    def step(self, number: int) -> None:
        """One step; its seconds, in all and by phase, are kept."""
        began = time.process_time()
        with forced(self.lengths, self.tokenizer.stop_ids):
            m, rollouts = train.train_step(self.run, number)
        seconds = time.process_time() - began
        assert [len(r.response_tokens) for r in rollouts] == self.lengths
        phases = {key: m[f"seconds_{key}"] for key in ("rollout", "check", "update")}
        self.taken.append({"seconds": seconds, **phases})

    def median(self) -> dict:
        """The row as numbers; microseconds a token of a solution."""
        median = {k: statistics.median(t[k] for t in self.taken) for k in self.taken[0]}
        facts = {"axis": self.axis, "rows": self.rows, "length": self.length, "width": self.width}
        facts["parameters"] = sum(p.numel() for p in self.model.parameters())
        return facts | median | {"per_token_us": 1e6 * median["seconds"] / sum(self.lengths)}


def settings(o: Options) -> list[Setting]:
    """The table's rows: the base, then each axis without what the base already is."""
    sizes = [("base", *BASE)]
    for place, (axis, values) in enumerate(AXES.items()):
        others = [x for x in values if x != BASE[place]] if axis in o.axes else []
        sizes += [(axis, *BASE[:place], x, *BASE[place + 1 :]) for x in others]
    return [Setting(*size) for size in sizes if PROBLEMS * size[1] <= o.most_rows]


# ---------------------------------------------------------------------------------------------
# the update alone

# group size, prompt's tokens, solution's tokens; the base stands in every axis
UPDATE_AXES = {"group": (2, 4, 8, 16, 32, 64), "prompt": (16, 64, 250, 500, 1000, 2000),
               "response": (16, 64, 250, 1000, 4000)}  # fmt: skip
UPDATE_BASE = (4, 64, 64)


def one_update(model: CausalLM, group: int, prompt: int, response: int) -> dict:
    """Costs of the update of one group, for each token of its solutions."""
    rollouts = [
        Rollout(0, [5] * prompt, [6 + i % 9] * response, [-1.0] * response, logp_zc=-12.0,
                finished=True, r_v=float(i % 2))
        for i in range(group)
    ]  # fmt: skip
    advantages = torch.tensor([-1.0, 1.0]).repeat(group // 2)
    work = lambda: grpo.accumulate_gradients(  # noqa: E731
        model, rollouts, advantages, torch.ones(group), grpo.Loss(c_ref=-12.0), 2048)
    work()
    began, runs = time.process_time(), 0
    while not runs or time.process_time() - began < 0.3:
        work()
        runs += 1
    seconds = (time.process_time() - began) / runs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    peak = max(itertools.accumulate(sizes))
    # three passes of two operations for each weight and token; attention's four for each pair
    c, tokens = model.config, group * response
    weights = sum(p.numel() for p in model.parameters())
    pieces = len(grpo.micro_batches(rollouts, 2048))  # of the group, each with the prompt once
    pairs = pieces * prompt**2 / 2 + group * response * (prompt + response / 2)
    width = c.num_attention_heads * c.head_dim
    operations = 6 * weights * (tokens + pieces * prompt)
    operations += 12 * c.num_hidden_layers * width * pairs
    return {"group": group, "prompt": prompt, "response": response, "us": 1e6 * seconds / tokens,
            "kB": peak / 1000 / tokens, "operations": operations / tokens}  # fmt: skip


def updates(file: str) -> int:
    """The update's table, its picture, and the JSON line."""
    model = load_pretrained("tiny", device="cpu", dtype="float32")[0]
    table = {}
    print(f"{'':<10}{'group':>6}{'prompt':>8}{'response':>9}{'us/token':>10}{'kB/token':>10}"
          f"{'ns/kFLOP':>10}")  # fmt: skip
    for place, (axis, values) in enumerate(UPDATE_AXES.items()):
        sizes = [(*UPDATE_BASE[:place], x, *UPDATE_BASE[place + 1 :]) for x in values]
        table[axis] = [one_update(model, *size) for size in sizes]
        for r in table[axis]:
            sizes = f"{r['group']:6d}{r['prompt']:8d}{r['response']:9d}"
            costs = f"{r['us']:10.1f}{r['kB']:10.1f}{1e6 * r['us'] / r['operations']:10.1f}"
            print(f"{axis:<10}{sizes}{costs}", flush=True)
    draw(table, file)
    print(json.dumps({"benchmark": "scaling of the update", **table}))
    return 0


def draw(table: dict, file: str) -> None:
    """Measured costs as lines, the arithmetic's (scaled to the base) dashed; both axes by tens."""
    panels = []
    for place, (name, rows) in enumerate(table.items()):
        at = next(r for r in rows if r[name] == UPDATE_BASE[place])
        scaled = [at["us"] / at["operations"] * r["operations"] for r in rows]
        log = lambda ys, rows=rows, name=name: [  # noqa: E731
            [(math.log10(r[name]), math.log10(y)) for r, y in zip(rows, ys)]
        ]
        marks = [
            svg.mark(log([r["us"] for r in rows]), "#1f5fa8", "seconds"),
            svg.mark(log(scaled), "#222", "operations", stroke_dasharray=svg.DASH),
            svg.mark(log([r["kB"] for r in rows]), "#b5541c", "memory"),
        ]
        ticks = {math.log10(r[name]): f"{r[name]:,}" for r in rows}
        tens = {power: f"{10**power:,}" for power in range(6)}
        unit = "solutions in the group" if name == "group" else f"tokens of the {name}"
        title = "us, and kB at the peak, for each token"
        panels.append(svg.panel(title, unit, "", marks, x_ticks=ticks, y_range=(0.8, 4.1),
                                y_ticks={y: label for y, label in tens.items() if 0.8 <= y <= 4.1}))
    write_atomic(Path(file), svg.picture(panels))


def main() -> int:
    """The table, then the JSON line."""
    o, _ = parse_args(Options)
    torch.set_num_threads(1)
    if o.update:
        return updates(o.update)
    train.time = types.SimpleNamespace(perf_counter=time.process_time)  # its phases in CPU time
    table = settings(o)
    table[0].step(1)
    table[0].taken.clear()  # torch's first calls set things up
    for number in range(1, o.runs + 1):
        # forth and back: a machine that gets slower is not always slower for the same rows
        for setting in table[:: 1 if number % 2 else -1]:
            setting.step(number)
    rows = [setting.median() for setting in table]
    base = rows[0]["per_token_us"]
    print(f"{PROBLEMS} problems, {rows[0]['parameters']:,} parameters at C = {BASE[2]}")
    print(f"{'':<8}{'rows':>5}{'tokens':>8}{'width':>7}{'s/step':>9}{'rollout':>9}{'update':>8}"
          f"{'us/token':>10}{'of base':>9}")  # fmt: skip
    last = "base"
    for r in rows:
        if r["axis"] != last:
            print()
            last = r["axis"]
        print(f"{r['axis']:<8}{r['rows']:5d}{r['length']:8d}{r['width']:7d}{r['seconds']:9.3f}"
              f"{r['rollout']:9.3f}{r['update']:8.3f}{r['per_token_us']:10.1f}"
              f"{r['per_token_us'] / base:9.2f}")  # fmt: skip
    cost = {r["rows"]: r["per_token_us"] for r in rows if r["axis"] in ("base", "group")}
    least, most = min(cost), max(cost)
    spread, growth = max(cost.values()) / min(cost.values()) - 1, cost[most] / cost[least] - 1
    # dearer tokens in larger steps would be a fault; cheaper ones are what large batches are for
    met = "met" if spread <= GOAL else "MISSED" if growth > 0 else "not flat, it falls"
    print(f"cost of a token from {least} to {most} rows: {growth:+.0%}, spread {spread:.0%}; "
          f"goal {GOAL:.0%}: {met}")  # fmt: skip
    print(json.dumps({"benchmark": "scaling", "goal": GOAL, "spread": spread, "growth": growth,
                      "table": rows}))  # fmt: skip
    return 0


if __name__ == "__main__":
    main_guard(main)
